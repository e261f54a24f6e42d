"""What keeps a run from harm: one trainer a folder, and an end to a run that hangs."""

import contextlib
import faulthandler
import fcntl
import logging
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Iterator

LOCK = "lock"


@contextlib.contextmanager
def claim(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a stage's folder for this process; the kernel lets go of it however the process ends.

    Raises: ValueError naming the trainer that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is being trained by {holder}; wait for it, stop it, or choose another "
                             "--workdir") from error
        except OSError as error:   # not every network file system has locks
            logging.warning("%s cannot be locked (%s): a second trainer would not be refused", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
