"""What the system keeps of files in memory."""

import os
import pathlib


def let_go(file: pathlib.Path) -> None:
    """Has the system write a file's pages, and drop those that are written.

    A file as large as the memory that is read or written once needs none of them again. Memory that goes round
    is fast; memory that the system must find anew for every page took most of the time of writing. Nothing
    happens where the system takes no such advice (macOS).
    """
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
