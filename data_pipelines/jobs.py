"""Many pieces of work over a few processes, none of which outlives the command."""

import concurrent.futures
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
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
    # Forked processes would inherit the locks of threads that they do not have.
    with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=multiprocessing.get_context("spawn"),
            initializer=end_with_parent) as pool:
        indices = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        try:
            for future in concurrent.futures.as_completed(indices):
                yield indices[future], future.result()
        except BrokenProcessPool as error:
            raise ValueError("a worker process was killed; if the machine ran out of memory, use fewer "
                             "--workers, and run the same command again") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
