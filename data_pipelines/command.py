"""How every command starts: flags in, one call, and a user's mistake told in one sentence."""

import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging


def run(main: Callable[[Any], None]) -> None:
    """Parses the flags and calls `main(FLAGS)`; a ValueError becomes its message and exit status 1.

    Anything else is a fault of ours and keeps its traceback.
    """
    app.run(lambda argv: _call(main, argv), flags_parser=_parse)


def _call(main: Callable[[Any], None], argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # libraries tell the story of every file they write
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {' '.join(argv[1:])}")
    try:
        main(flags.FLAGS)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = _read_flags(argv)
        for name in flags.FLAGS:
            # A config file that does not load becomes an object that raises on its first use.
            getattr(flags.FLAGS[name].value, "items", None)
        return rest
    except AttributeError as error:  # how config_flags reports an override of an unknown field
        flag = next((flag for flag in argv if "." in flag and _leaf(flag) in str(error)), "a flag")
        nearest = re.search(r'Did you mean "(.+?)"', str(error))
        hint = f"; did you mean {nearest[1]!r}?" if nearest else ""
        sys.exit(f"error: {flag} names no config field{hint}")
    except (flags.Error, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _read_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl's --help ends with status 1; being helped is no failure
        sys.exit(0)


def _leaf(flag: str) -> str:
    return flag.partition("=")[0].rpartition(".")[2]
