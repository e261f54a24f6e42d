"""Writes one page that shows what a data set holds and what training makes of it.

    python -m data_pipelines.show runs/shapes/data --config configs/shapes_stage1.py

The page has counts and lengths of every mode, sample records part by part, and, with a config, packs
drawn from the real pipeline: their streams, who sees whom, and where the loss is. It is one file that
carries its pictures in itself and opens anywhere. Without --config it shows records only.
"""

import dataclasses
import pathlib
import shlex
import sys
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import DataConfig
from data_pipelines.datasets import open_source
from data_pipelines.digests import write_text
from data_pipelines.pipeline import Packs
from data_pipelines.show_page.modes import NUM_PROBED, find_groups, is_shapes, probe_sources, view_tables
from data_pipelines.show_page.packs import view_pack
from data_pipelines.show_page.page import Page, format_bytes, render_page
from data_pipelines.show_page.records import choose_records, clip, view_record
from data_pipelines.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
SHAPES_TOKENIZER = pathlib.Path(__file__).parent.parent / "assets" / "shapes_base" / TOKENIZER
MAX_RECORDS, MAX_PACKS = 20, 20  # of a page that a phone still opens


def show(folder: pathlib.Path, *, config: Any = None, tokenizer: str | None = None, num_records: int = 2,
         num_packs: int = 2, seed: int | None = None) -> str:
    """The page of a data set folder as HTML.

    Args:
        config: of a training stage, as `load_config` gives it; without one there are no packs.
        tokenizer: a tokenizer.json; by default that of the config's init_from, of the folder, or of shapes.
        num_records: of each mode.
        seed: of the choice of records, and of the packs; by default 0, and the config's.
    Raises: ValueError in one sentence for anything that is missing, broken or out of range.
    """
    for name, value, limit in (("records", num_records, MAX_RECORDS), ("packs", num_packs, MAX_PACKS),
                               ("seed", seed or 0, 2**32)):
        if not 0 <= value <= limit:
            raise ValueError(f"--{name} is {value}; it must be from 0 to {limit}")
    if tokenizer and config is None:
        raise ValueError("--tokenizer needs --config: without one nothing is turned into tokens")
    data, init_from = _read_config(folder, config, seed)
    path = None
    if config is not None:
        path = tokenizer or _find_tokenizer(folder, init_from)
        if path is None:
            raise ValueError(f"no {TOKENIZER} in {str(folder)!r} or in the config's init_from {init_from!r}; "
                             "pass --tokenizer FILE")
    encoder = Tokenizer.from_file(str(path)) if path else None
    sources = {group.name: open_source(data, group) for group in data.groups}
    packs = Packs(data, encoder, keep_journal=False) if encoder else None
    records = {}
    for group in tqdm(data.groups, "records", disable=None, leave=False):
        chosen = choose_records(sources[group.name], mode=group.name, count=num_records, seed=seed or 0)
        records[group.name] = [view_record(sources[group.name], index, data, group=group,
                                           tokenizer=encoder) for index in chosen]
    drawn = [view_pack(packs, index, encoder) for index
             in tqdm(range(num_packs if packs else 0), "packs", disable=None, leave=False)]
    modes = view_tables(data, packs.tables) if packs else probe_sources(data, sources)
    facts = {"Command": f"python -m data_pipelines.show {shlex.join(sys.argv[1:])}", "Folder": str(folder),
             "Seed": f"{seed or 0} for the choice of records"}
    if packs:
        facts["Tokenizer"] = str(path)
        facts["Seed"] += f", {data.seed} for the packs"
    return render_page(Page(
        title=clip(folder.name, 200)[0], modes=modes, records=records, packs=drawn,
        facts={name: clip(fact, 500)[0] for name, fact in facts.items()},
        num_probed=0 if packs else NUM_PROBED))


def _read_config(folder: pathlib.Path, config: Any, seed: int | None) -> tuple[DataConfig, str]:
    """The data's configuration with `folder` as its source, and the checkpoint training starts from."""
    if config is None:
        return find_groups(folder), ""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the folder of a data set")
    data = dataclasses.replace(command.data_of(config), source=str(folder))
    return data if seed is None else dataclasses.replace(data, seed=seed), str(config.get("init_from", ""))


def _find_tokenizer(folder: pathlib.Path, init_from: str) -> pathlib.Path | None:
    candidates = [folder / TOKENIZER]
    if init_from:
        candidates.insert(0, pathlib.Path(init_from) / TOKENIZER)
    if is_shapes(folder):
        candidates.append(SHAPES_TOKENIZER)
    return next((path for path in candidates if path.is_file()), None)


def main(values: Any) -> None:
    folder = pathlib.Path(values.dir).resolve()
    out = pathlib.Path(values.out or folder.parent / f"{folder.name}_show.html")
    if out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a folder; give the file to write")
    text = show(folder, config=values.config, tokenizer=values.tokenizer, num_records=values.records,
                num_packs=values.packs, seed=values.seed)
    try:
        write_text(out, text)
    except OSError as error:
        raise ValueError(f"{str(out)!r} cannot be written ({error.strerror}); choose another --out") from error
    print(f"wrote {out} ({format_bytes(out.stat().st_size)})")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"--dir={sys.argv[1]}"  # the one argument that needs no name
    flags.DEFINE_string("dir", None, "Folder of the data set; also the first argument.")
    command.define_config("A training configuration; its mixture, and packs, are shown.")
    flags.DEFINE_string("tokenizer", None, "tokenizer.json; default: of the config's init_from, DIR or shapes.")
    flags.DEFINE_string("out", None, "The page, instead of DIR_show.html beside DIR.")
    flags.DEFINE_integer("records", 2, "Records of each mode.")
    flags.DEFINE_integer("packs", 2, "Packs.")
    flags.DEFINE_integer("seed", None, "Of the choice of records (default 0), and of the packs (the config's).")
    flags.mark_flags_as_required(["dir"])
    command.run(main)
