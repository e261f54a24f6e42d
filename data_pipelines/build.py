"""Writes a data set: the shapes world as parquet, or a folder in the released layout as ArrayRecord.

    python -m data_pipelines.build --config configs/shapes_data.py \
        --source shapes --format parquet --out DIR
    python -m data_pipelines.build --config configs/irgl_stage1.py --tokenizer TOKENIZER.json \
        --source IRGL-300K --format array_record --out DIR

The first is described in `shapes/build.py`. The second reads `<mode>/*.parquet`, perhaps below a folder
for the split, and writes

    DIR/[<split>/]<mode>/   a TFDS data set, see `tfds_builder.py`, with the records' costs
    DIR/manifest.json       counts of each mode, what it was built from, sha256 and size of every file

Everything is written beside DIR and takes its name at the very end, so DIR is whole or absent. A build
that was killed goes on where it ended. One bad record, and nothing is written but the list of all.
"""

import json
import pathlib
from typing import Any

from absl import flags

from data_pipelines import command
from data_pipelines.config import BuildConfig, from_config_dict
from data_pipelines.digests import MANIFEST
from data_pipelines.shapes.build import build

SHAPES = "shapes"


def main(values: Any) -> None:
    if (values.format == "parquet") != (values.source == SHAPES):
        raise ValueError(f"--source {values.source} cannot be written as {values.format}; {SHAPES} is written "
                         "as parquet, and a folder of parquet as array_record")
    if values.source == SHAPES:
        config = from_config_dict(BuildConfig, values.config)
        written = build(config, out=values.out, overwrite=values.overwrite, workers=values.workers)
        records, modes = sum(config.counts.values()), len(config.counts)
    else:
        written, records, modes = _convert(values)
    print(f"{'wrote' if written else 'already built:'} {records} records of {modes} modes in {values.out}")


def _convert(values: Any) -> tuple[bool, int, int]:
    from data_pipelines.conversion import convert  # TFDS takes long to import
    config = command.data_of(values.config)
    if not values.tokenizer:
        raise ValueError("--tokenizer is missing: name the model's tokenizer.json, which counts the tokens")
    written = convert(
        values.source, out=values.out, config=config, tokenizer=values.tokenizer, overwrite=values.overwrite,
        drop_bad=values.drop_bad, decode=values.decode, workers=values.workers, shard_mib=values.shard_mib)
    modes = json.loads((pathlib.Path(values.out) / MANIFEST).read_text(encoding="utf-8"))["modes"]
    return written, sum(mode["records"] for mode in modes.values()), len(modes)


if __name__ == "__main__":
    command.define_config("The data set's configuration file, or one for training.")
    flags.DEFINE_string("source", SHAPES, "shapes, or a folder of <mode>/*.parquet.")
    flags.DEFINE_enum("format", "parquet", ["parquet", "array_record"], "The file format of the records.")
    flags.DEFINE_string("out", None, "Folder of the data set.")
    flags.DEFINE_bool("overwrite", False, "Replace another data set in --out.")
    flags.DEFINE_string("tokenizer", None, "tokenizer.json that counts the texts' tokens.")
    flags.DEFINE_bool("drop_bad", False, "Leave bad records out, and name them in the manifest.")
    flags.DEFINE_bool("decode", True, "Decode every image once, to be sure of it.")
    flags.DEFINE_integer("workers", 0, "Processes; 0: one for each core.", lower_bound=0)
    flags.DEFINE_integer("shard_mib", 256, "Size of a file, about, in MiB of unpacked parquet.", lower_bound=1)
    flags.mark_flags_as_required(["config", "out"])
    command.run(main)
