"""What the files of a bundle held when they were written.

Orbax checks its own structure but no values: a flipped byte would restore silently wrong. So a step is sealed
once it is complete: `digests.json` beside its items has size and sha256 of every file. Only sealed steps are
restored, and only if they are still what was sealed; others are set aside under another name, to be looked at.
"""

import hashlib
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SEAL = "digests.json"
_THREADS = 4


def seal(step: pathlib.Path) -> None:
    """Writes the digests of a complete step; whole or not at all."""
    partial = step / f"{SEAL}.partial"
    partial.write_text(json.dumps(_digests(step), indent=0), encoding="utf-8")
    descriptor = os.open(partial, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    partial.rename(step / SEAL)


def find_faults(step: pathlib.Path, items: Collection[str] = ()) -> list[str]:
    """What is not as it was sealed, a sentence each; empty for a sound step.

    Args: items of the step that are looked at alone, with what belongs to none; empty: all.
    """
    try:
        sealed = json.loads((step / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["it was not sealed: its save did not end"]
    except (OSError, ValueError, RecursionError) as error:
        return [f"{SEAL} cannot be read: {error}"]
    if not isinstance(sealed, dict):
        return [f"{SEAL} holds no object"]
    sealed = {name: each for name, each in sealed.items() if _is_of(name, items)}
    try:
        found = _digests(step, items)
    except OSError as error:
        return [f"it cannot be read: {error}"]
    return ([f"{name} is missing" for name in sealed if name not in found]
            + [f"{name} was not there when it was sealed" for name in found if name not in sealed]
            + [f"{name} has changed since it was sealed" for name in found
               if name in sealed and found[name] != sealed[name]])


def steps_of(folder: pathlib.Path) -> list[int]:
    """Numbers of all steps in a folder of bundles, the newest first; of those under way or set aside none."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def set_bad_aside(folder: pathlib.Path) -> list[str]:
    """Goes back to the newest step that is sound; returns a sentence for each newer one, renamed."""
    sentences = []
    for step in steps_of(folder):
        if not (faults := find_faults(folder / str(step))):
            break
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        where = set_aside(folder, step)
        sentences.append(f"checkpoint {folder / str(step)} is not used: {'; '.join(faults[:3])}{more}. "
                         f"It is {where.name} now")
    return sentences


def set_aside(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Renames a step to <step>.bad, <step>.bad.1, ...; returns where it is."""
    number, target = 0, folder / f"{step}.bad"
    while target.exists():
        number += 1
        target = folder / f"{step}.bad.{number}"
    (folder / str(step)).rename(target)
    return target


def _digests(step: pathlib.Path, items: Collection[str] = ()) -> dict[str, list]:
    """Of every file of these items but the seal: [bytes, sha256] by its path in the step."""
    names = sorted(path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())
    names = [name for name in names if name not in (SEAL, f"{SEAL}.partial") and _is_of(name, items)]
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _digest(step / name), names)))


def _is_of(name: str, items: Collection[str]) -> bool:
    item, separator, _ = name.partition("/")
    return not items or not separator or item in items


def _digest(path: pathlib.Path) -> list:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return [file.tell(), digest.hexdigest()]


def ignore_late_faults() -> None:
    """For commands that tell a failed read or write in one sentence, and then end.

    Of several that fail TensorStore tells the later ones when nobody listens any more, and what Orbax had not
    begun is never awaited; Python would tell both after the sentence.
    """
    def hook(fault: Any) -> None:
        if str(fault.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(fault)
    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)
