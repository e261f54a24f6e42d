"""The trajectories of one request, between the engine's thread and the loop that answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request

from irg_jax.sampling.modes import converse
from irg_jax.sampling.steps import Job
from irg_jax.sampling.trajectory import Generator, Turn
from irg_jax.serving.engine import Engine, Task
from irg_jax.serving.requests import Wanted

IDLE_SECONDS = 15


class Failed(Exception):
    """A step of a trajectory went wrong, by no fault of its request."""


class Trajectories:
    """Under way from their making on; `answers` are whole when `events` ends."""

    def __init__(self, generator: Generator, engine: Engine, wanted: Wanted, timeout: float):
        """Args: timeout is seconds from now. Raises: ValueError, engine.Full, engine.Closed."""
        self._loop, self._events, self._engine = asyncio.get_running_loop(), asyncio.Queue(), engine
        self._deadline = self._loop.time() + timeout
        self.answers: list[tuple[Turn, ...] | None] = [None] * wanted.n
        self._tasks = [self._make_task(generator, wanted, index) for index in range(wanted.n)]
        engine.submit(self._tasks)

    def _make_task(self, generator: Generator, wanted: Wanted, index: int) -> Task:
        tell = lambda turn, made: self._put((index, turn, made))
        end = lambda answer, fault: self._put((index, None, fault or answer))
        return Task(Job(converse(generator, wanted.conversation, wanted.mode, seed=wanted.seed_of(index),
                                 given=wanted.given, tell=tell)), end)

    def _put(self, event: tuple[int, int | None, Any]) -> None:
        """From the engine's thread to the loop's."""
        with contextlib.suppress(RuntimeError):   # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Nobody waits for what has not ended."""
        self._engine.cancel(self._tasks)

    async def events(self) -> AsyncIterator[tuple[int, int, str | np.ndarray] | None]:
        """(which trajectory, turn, text or image) as they appear; None where there was nothing for a while.

        Raises: TimeoutError at the deadline; Failed.
        """
        while None in self.answers:
            left = self._deadline - self._loop.time()
            try:
                index, turn, made = await asyncio.wait_for(self._events.get(), min(left, IDLE_SECONDS))
            except TimeoutError:
                if left <= IDLE_SECONDS:
                    raise
                yield None
                continue
            if turn is not None:
                yield index, turn, made
            elif isinstance(made, Exception):
                raise Failed from made
            else:
                self.answers[index] = made

    async def finish(self, request: Request) -> list[tuple[Turn, ...]]:
        """The answers of all. Raises: as `events`; ClientDisconnect as soon as nobody waits for them."""
        async def wait() -> None:
            async for _ in self.events():
                pass

        async def wait_until_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        ended, gone = asyncio.ensure_future(wait()), asyncio.ensure_future(wait_until_gone())
        try:
            await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                raise ClientDisconnect
            ended.result()
            return self.answers
        finally:
            ended.cancel()
            gone.cancel()
            self.cancel()
