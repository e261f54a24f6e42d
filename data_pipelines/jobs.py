"""Many pieces of work over a few processes, none of which outlives the command."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(function: Callable[[Job], Result], jobs: Sequence[Job], *,
             workers: int) -> Iterator[tuple[int, Result]]:
    """Yields (index of the job, its result) as they are done; without processes if one worker is enough.

    Args: function and jobs must survive being sent to another process.
    Raises: whatever a job raises, and ValueError if a worker was killed.
    """
    if min(workers, len(jobs)) <= 1:
        yield from ((index, function(job)) for index, job in enumerate(jobs))
        return
    with open_pool(min(workers, len(jobs))) as pool:
        indices = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        for future in concurrent.futures.as_completed(indices):
            yield indices[future], future.result()


@contextlib.contextmanager
def open_pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A context of worker processes; its end waits for what runs, and drops what waits.

    Raises: ValueError, in place of what the pool raises, if a worker was killed.
    """
    # Forked processes would inherit the locks of threads that they do not have.
    with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise ValueError("a worker process was killed; if the machine ran out of memory, use fewer "
                             "--workers, and run the same command again") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def map_ahead(pool: concurrent.futures.Executor, function: Callable[[Job], Result], jobs: Iterable[Job], *,
              ahead: int) -> Iterator[Result]:
    """The results in order, while the pool works on up to `ahead` more; jobs may be without end."""
    running: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for job in jobs:
            running.append(pool.submit(function, job))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def show_progress(**options: Any) -> tqdm:
    """A bar with an estimate; in a log, which nobody watches from second to second, once a minute."""
    return tqdm(**options) if sys.stderr.isatty() else tqdm(mininterval=60, delay=60, **options)


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does, also after SIGKILL."""
    threading.Thread(target=_follow_parent, name="follow-parent", daemon=True).start()


def _follow_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent is gone, however it ended
    os._exit(1)
