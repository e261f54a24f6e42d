"""What keeps a run from harm: one trainer a folder, and an end to a run that hangs."""

import contextlib
import faulthandler
import pathlib
import signal
import sys
from collections.abc import Iterator

from irg_jax.checkpoints.locks import locked

LOCK = "lock"


def claim(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps a stage's folder for this process. Raises: ValueError naming the trainer that has it."""
    return locked(folder / LOCK, f"{folder} is being trained", "--workdir")


class Watchdog:
    """Ends a run that makes no progress for so many seconds, with the stacks of all threads on stderr.

    The watch is kept by a thread of C: it needs no lock of Python's, which a hang may hold. `kill -USR1` shows
    the stacks of a run and lets it go on.
    """

    def __init__(self, seconds: int):
        """Args: seconds of 0 watch nothing."""
        self._seconds = seconds

    def progress(self) -> None:
        """To be told after every step, save and drawing."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
        self.progress()
        try:
            yield self
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR1)
