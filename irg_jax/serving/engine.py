"""Many requests on one generator: a thread that lets trajectories of one kind take their steps together.

Requests come at any time and are at different steps. Each time the largest group of trajectories whose next
step is of one kind goes on, so that newcomers catch up with others and share their batch; who was passed over
`PATIENCE` times goes first.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from irg_jax.sampling.steps import Job, advance, group
from irg_jax.sampling.trajectory import Generator
from irg_jax.serving.config import ServeConfig
from irg_jax.serving.metrics import Metrics

PATIENCE = 8


class Full(Exception):
    """The queue has no room for what was submitted."""


class Closed(Exception):
    """Nothing is accepted any more."""


class Task:
    """A trajectory that somebody waits for."""

    def __init__(self, job: Job, tell_end: Callable[[Any, Exception | None], None]):
        """Args: tell_end is called once, by the engine's thread, with the answer or with what went wrong."""
        self.job, self.tell_end = job, tell_end
        self.passed_over, self.is_cancelled = 0, False


class Engine:
    """Runs tasks in a thread of its own until it is closed."""

    def __init__(self, generator: Generator, config: ServeConfig, metrics: Metrics):
        self._generator, self._config, self._metrics = generator, config, metrics
        self._waiting: collections.deque[Task] = collections.deque()
        self._active: list[Task] = []
        self._is_closed, self._changed = False, threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def submit(self, tasks: Sequence[Task]) -> None:
        """All of them, or none. Raises: Full, Closed."""
        with self._changed:
            if self._is_closed or not self.is_alive:
                raise Closed
            if len(self._waiting) + len(tasks) > self._config.max_queue:
                raise Full
            self._waiting.extend(tasks)
            self._watch()
            self._changed.notify()

    def cancel(self, tasks: Sequence[Task]) -> None:
        """Nobody waits for them any more; what they were told of is over."""
        with self._changed:
            for task in tasks:
                task.is_cancelled = True
            # At once: a step may take long, and who comes meanwhile is to find the room.
            self._waiting = collections.deque(task for task in self._waiting if not task.is_cancelled)
            self._watch()
            self._changed.notify()

    def close(self) -> None:
        """Accepts nothing more, finishes what was accepted, and ends."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            tasks = choose(self._active, self._config.max_batch)
            name = tasks[0].job.step.run.__name__
            start = time.perf_counter()
            try:
                advance(self._generator, [task.job for task in tasks], self._size(len(tasks)))
            except Exception as fault:  # whatever it is, others must go on; it is told to those whom it met
                logging.exception("a step of %d trajectories failed (%s)", len(tasks), name)
                self._end(tasks, fault)
            else:
                self._metrics.took_step(name, time.perf_counter() - start, len(tasks))
                self._end([task for task in tasks if task.job.step is None], None)

    def _admit(self) -> bool:
        """Waits for something to do; False if there will be nothing more."""
        with self._changed:
            while True:
                self._active = [task for task in self._active if not task.is_cancelled]
                while self._waiting and len(self._active) < self._config.max_active:
                    self._active.append(self._waiting.popleft())
                self._watch()
                if self._active:
                    return True
                if self._is_closed:
                    return False
                self._changed.wait()

    def _size(self, count: int) -> int:
        size = next(size for size in batch_sizes(self._config.max_batch) if size >= count)
        return self._generator.fit_batch(size)

    def _end(self, tasks: Sequence[Task], fault: Exception | None) -> None:
        with self._changed:
            self._active = [task for task in self._active if task not in tasks]
        for task in tasks:
            if not task.is_cancelled:
                task.tell_end(task.job.answer, fault)

    def _watch(self) -> None:
        self._metrics.has_queue(len(self._waiting), len(self._active))


def batch_sizes(max_batch: int) -> list[int]:
    """What batches are filled up to: few sizes to compile, and few trajectories drawn in vain."""
    return [*(1 << power for power in range((max_batch - 1).bit_length())), max_batch]


def choose(tasks: Sequence[Task], max_batch: int) -> list[Task]:
    """Those that go on next, of one kind; counts for the others that they were passed over."""
    by_job = {id(task.job): task for task in tasks}
    groups = [[by_job[id(job)] for job in jobs] for jobs in group([task.job for task in tasks])]
    waited = lambda tasks: max(task.passed_over for task in tasks)
    size = lambda tasks: min(len(tasks), max_batch)
    impatient = [tasks for tasks in groups if waited(tasks) >= PATIENCE]
    chosen = max(impatient, key=waited) if impatient else max(groups, key=size)
    chosen = sorted(chosen, key=lambda task: -task.passed_over)[:max_batch]
    for task in tasks:
        task.passed_over += 1
    for task in chosen:
        task.passed_over = 0
    return chosen
