"""Tells which checkpoints a training has, whether they are sound, and what they hold.

    python -m irg_jax.checkpoint ls|verify|show DIR [--leaves]

DIR is a run (each of its stages), a stage (RUN/stage1), its `checkpoints`, or for verify and show one step
(RUN/stage1/checkpoints/100). `ls` goes by names and sizes. `verify` reads every byte; its exit status is 1
if a step that counts is damaged, or none is there. `show` prints items, arrays and data position of the step
that a resume takes, from metadata: it reads no array, and does not see whether one is damaged.
"""

import argparse
import contextlib
import logging
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from data_pipelines.jobs import show_progress
from irg_jax.checkpoints.listing import (
    SEALED,
    Step,
    find_resumed,
    find_stages,
    find_step,
    list_steps,
    printable,
)
from irg_jax.checkpoints.seals import find_faults, ignore_late_faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1, and a sentence, if something is damaged or missing."""
    parser = argparse.ArgumentParser(prog="python -m irg_jax.checkpoint", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["ls", "verify", "show"])
    parser.add_argument("dir", metavar="DIR", help="folder of a run, a stage, or (verify, show) a step")
    parser.add_argument("--leaves", action="store_true", help="show: every array, with shape and dtype")
    flags = parser.parse_args(arguments)
    folder = pathlib.Path(os.path.abspath(flags.dir))   # `.` has a name too
    try:
        if flags.action == "ls":
            print_steps(folder)
        elif flags.action == "verify":
            verify(folder)
        else:
            show(folder, leaves=flags.leaves)
    except (ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


def print_steps(folder: pathlib.Path) -> None:
    """One line for each step, of whatever standing."""
    rows = []
    for stage in find_stages(folder):
        steps = list_steps(stage)
        resumed = find_resumed(steps)
        for step in steps:
            with contextlib.suppress(FileNotFoundError):   # a training may drop it meanwhile
                rows.append([step.stage, step.label, format_time(step), format_size(step.size()), step.standing,
                             "<- a resume takes this" if step is resumed else ""])
    print(align(rows, "<<<><<") if rows else f"no steps in {folder}")


def verify(folder: pathlib.Path) -> None:
    """Prints what is wrong with every step. Raises: ValueError if one that counts is damaged, or none does."""
    named = find_step(folder)   # counts, whatever its standing
    steps = [named] if named else [step for stage in find_stages(folder) for step in list_steps(stage)]
    sizes = [step.size() if named or step.standing == SEALED else 0 for step in steps]
    counted = damaged = 0
    with show_progress(total=sum(sizes), desc="verify", unit="B", unit_scale=True) as bar:
        for step, size in zip(steps, sizes):
            place = f"{step.stage} {step.label}"
            if not named and step.standing != SEALED:
                bar.write(f"{place}: {step.standing}; does not count, and was not checked")
                continue
            start = time.monotonic()
            faults = find_faults(step.path)
            bar.update(size)
            if not step.path.exists():
                bar.write(f"{place}: removed meanwhile, as newer ones were saved")
                continue
            counted += 1
            damaged += bool(faults)
            lines = [f"{place}: damaged", *(f"  {fault}" for fault in faults)] if faults else [
                f"{place}: sound, {format_size(size)} in {time.monotonic() - start:.1f} s"]
            bar.write("\n".join(map(printable, lines)))
    if not counted:
        raise ValueError(f"{str(folder)!r} has no sealed step")
    if damaged:
        raise ValueError(f"{damaged} of {counted} steps in {str(folder)!r} damaged, as listed above; a resume "
                         "takes the newest sound one")


def show(folder: pathlib.Path, *, leaves: bool) -> None:
    """Prints what a step holds, or of each stage the one that a resume takes."""
    named = find_step(folder)
    steps = [named] if named else [step for stage in find_stages(folder)
                                   if (step := find_resumed(list_steps(stage)))]
    if not steps:
        raise ValueError(f"{str(folder)!r} has no sealed step")
    import jax  # it and Orbax take seconds, which `ls` should not cost

    from irg_jax.checkpoints.contents import group, read_contents
    jax.config.update("jax_platforms", "cpu")   # the accelerator may be at work, on this very run
    for step in steps:
        contents = read_contents(step.path)
        print(f"{step.path}: {step.standing}, saved {format_time(step)}, {format_size(step.size())}\n")
        print(align([["item", "bytes"], *([item, f"{size:,}"] for item, size in contents.sizes.items())], "<>"))
        for item, tree in contents.trees.items():
            rows = [[item, "arrays", "parameters", "dtype"]]
            for name, members in group(tree).items():
                dtypes = sorted({leaf.dtype.name for leaf in members})
                rows.append([name, f"{len(members):,}", f"{sum(leaf.count for leaf in members):,}",
                             " ".join(dtypes)])
            print("\n" + align(rows, "<>><"))
            if leaves:
                print("\n" + align([[f"{item}.{leaf.path}", str(list(leaf.shape)), leaf.dtype.name]
                                    for leaf in tree], "<<<"))
        print(f"\nposition\n{contents.position}\n")


def format_time(step: Step) -> str:
    return step.saved().strftime("%Y-%m-%d %H:%M:%S")


def format_size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def align(rows: Sequence[Sequence[str]], aligns: str) -> str:
    """Columns of a table, each to the left (<) or right (>)."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths)).rstrip()
             for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable()   # a fault is told in one sentence; Orbax would print whole files, asyncio tracebacks
    ignore_late_faults()
    sys.exit(main())
