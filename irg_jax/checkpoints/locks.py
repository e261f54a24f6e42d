"""One process at a place: a trainer in a stage's folder, a writer of a checkpoint."""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def locked(file: pathlib.Path, what: str, choice: str) -> Iterator[None]:
    """Keeps a lock file for this process; the kernel lets go of it however the process ends.

    Args: what is done by whoever has it ("RUN is being trained"), and what others may choose ("--workdir").
    Raises: ValueError naming the process that has it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise ValueError(f"{what} by {holder}; wait for it, stop it, or choose another {choice}") from error
        except OSError as error:   # not every network file system has locks
            logging.warning("%s cannot be locked (%s): a second process would not be refused", file, error)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield
