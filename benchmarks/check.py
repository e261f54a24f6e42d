"""What reading a whole data set costs: `check` and `build` over records of 1024 px images.

    python -m benchmarks.check [--records 60]

Records are those of `benchmarks.data`, once as JPEG and once as PNG, in parquet, and built from that as
ArrayRecord. Processor seconds of one core for a GiB of files, so that other work on the machine counts
little; more workers divide them, until the disk sets the pace. Prints one JSON object and writes it to
benchmarks/results/check.json.
"""

import pathlib
import tempfile
import time
from typing import Any

import numpy as np
from absl import flags

from benchmarks import machine
from benchmarks.data import FORMATS, WORDS, record, write
from data_pipelines import command
from data_pipelines.check import Wish, check
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.conversion import convert
from data_pipelines.tokenizer import train_tokenizer

MODE = "improving_full"


def measure_check(folder: pathlib.Path, wish: Wish) -> dict[str, float]:
    """One worker reads in this process."""
    begun = time.process_time()
    found = check(folder, wish, workers=1)[MODE]
    size = found.counts["file_bytes"] / 2**30
    assert not found.faults
    return {"gib": size, "seconds_per_gib": (time.process_time() - begun) / size,
            "images_per_second": found.counts["images"] / (time.process_time() - begun)}


def main(values: Any) -> None:
    result: dict[str, Any] = {"benchmark": "check",
                              **machine.describe("numpy", "pillow", "pyarrow", "array_record")}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train_tokenizer([" ".join(WORDS)] * 3, vocab_size=400).save(str(folder / "tokenizer.json"))
        for kind, options in FORMATS.items():
            rng, source, built = np.random.default_rng(0), folder / kind, folder / f"{kind}_built"
            write(source / MODE, [record(rng, **options) for _ in range(values.records)], rows_per_group=4)
            config = DataConfig(source=str(source), groups=(GroupConfig(MODE),))
            whole = Wish(config, str(folder / "tokenizer.json"))
            result[kind] = measure_check(source, whole)
            result[f"{kind}_headers"] = measure_check(source, whole._replace(decode=False))
            begun = time.process_time()
            convert(source, out=built, config=config, tokenizer=whole.tokenizer, workers=1)
            seconds = time.process_time() - begun
            result[f"{kind}_build"] = {"seconds_per_gib": seconds / result[kind]["gib"]}
            result[f"{kind}_built"] = measure_check(built, whole)
    machine.keep(result, values.out)


if __name__ == "__main__":
    flags.DEFINE_integer("records", 60, "Records of each format.", lower_bound=1)
    flags.DEFINE_string("out", str(machine.RESULTS / "check.json"), "The result file.")
    command.run(main)
