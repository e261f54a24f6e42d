"""How every command starts: flags in, one call, and a user's mistake told in one sentence."""

import ast
import errno
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from data_pipelines.config import DataConfig, from_config_dict, load_config

# What is wrong with a place that somebody named, rather than with us.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR,
               errno.EISDIR, errno.ENAMETOOLONG)
_OVERRIDE = re.compile(r"--?config\.([\w.\-]+)(?:=(.*))?", re.DOTALL)


def define_config(help_text: str) -> None:
    """Declares --config FILE and --config.x.y=value; `main` then finds a ConfigDict in `values.config`.

    Any field may be overridden, also one that the file leaves to its default; what no dataclass knows
    is refused where the ConfigDict is converted (`from_config_dict`).
    """
    flags.DEFINE_string("config", None, f"{help_text} --config.x.y=value overrides a field.")
    # --help shows the flags of the command's own module, and this one is declared here.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])


def data_of(config: Any) -> DataConfig:
    """The data of a training configuration. Raises: ValueError if it has none, or they are wrong."""
    if "data" not in config:
        raise ValueError("the config has no field data, whose mixture, transforms and limits count here; give "
                         "the config of a training stage, like configs/irgl_stage1.py")
    return from_config_dict(DataConfig, config.data, path="data")


def run(main: Callable[[Any], None]) -> None:
    """Parses the flags and calls `main(FLAGS)`; a ValueError becomes its message and exit status 1.

    So does a place that cannot be written. Anything else is a fault of ours and keeps its traceback.
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
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {place}{error.strerror}; make room or give access, or choose another place")


def _parse(argv: list[str]) -> list[str]:
    try:
        argv, overrides = _split_overrides(argv)
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS["config"].value = load_config(flags.FLAGS.config, overrides=overrides)
        return rest
    except SystemExit:  # absl's --help ends with status 1; being helped is no failure
        sys.exit(0)
    except (flags.Error, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _split_overrides(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(the other arguments, dotted field -> value); a value is a Python literal, or else a string."""
    others, overrides, words = [], {}, iter(argv)
    for word in words:
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            others.append(word)
            continue
        text = next(words, "--") if match[2] is None else match[2]
        if text.startswith("--"):
            raise ValueError(f"{word} has no value; write {word}=value")
        try:
            overrides[match[1]] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            overrides[match[1]] = text
    return others, overrides
