"""Import and export of a checkpoint of the released size: time against copying the files, and memory.

    python -m benchmarks.convert [--layers 28] [--folder DIR]

Writes a synthetic checkpoint of BAGEL-7B-MoT's geometry (14.6 B values, 29 GB in bf16, in shards of 5 GB),
copies its files, then runs `irg_jax.convert` and `irg_jax.export` as users do, and checks that the export is
the source, byte for byte. Twice the checkpoint must fit below DIR (default: a temporary folder). Prints one
JSON object and writes it to benchmarks/results/convert.json.

The limit is the disk: a copy reads and writes every byte once, and so does either command, which also hashes
them (twice in an import: the files for the source's digests, the leaves for the checkpoint's).
"""

import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from absl import flags

from benchmarks import machine
from data_pipelines import command
from irg_jax.checkpoints.bagel import export_leaves
from irg_jax.checkpoints.model import model_slots
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig

GIB = 2**30


def release(layers: int) -> ModelConfig:
    """BAGEL-7B-MoT with fewer layers of the language model."""
    return ModelConfig(
        LLMConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers,
                  num_attention_heads=28, num_key_value_heads=4),
        ViTConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                  num_attention_heads=16),
        VAEConfig())


def make_source(folder: pathlib.Path, config: ModelConfig) -> None:
    """A released folder of random weights; the autoencoder's are float32."""
    rng = np.random.default_rng(0)
    shapes = {f"{part}.{slot.leaf}": slot.our_shape for part, slots in model_slots(config).items()
              for slot in slots}
    dtypes = {path: np.dtype(np.float32 if path.startswith("vae") else ml_dtypes.bfloat16) for path in shapes}
    # Values of a normal distribution, since the checkpoint is compressed.
    pool = (rng.normal(size=2**24) * 0.02).astype(np.float32)

    def make(paths: list[str]) -> Iterator[np.ndarray]:
        for path in paths:
            start = int(rng.integers(pool.size))
            yield np.resize(np.roll(pool, start), shapes[path]).astype(dtypes[path])

    export_leaves(folder, config, None, dtypes, make)


def digests(folder: pathlib.Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.glob("*.safetensors*")):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """The weights, file by file; each copy goes when it is on disk, so that there is room."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            shutil.copyfileobj(reader, writer, 2**24)
            os.fsync(writer.fileno())
        (target / file.name).unlink()


def timed(work: Callable[[], Any]) -> float:
    begun = time.monotonic()
    work()
    os.sync()
    return time.monotonic() - begun


def run(*arguments: str) -> dict[str, float]:
    """A command: its seconds, files on disk, and the most memory it held.

    The kernel is asked while it runs: what it tells after the end (ru_maxrss) counts what this process held
    when it started the command.
    """
    begun, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if held := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")):
            peak = max(peak, int(held[1]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed with exit status {process.returncode}")
    os.sync()
    return {"seconds": time.monotonic() - begun, "peak_rss_gib": peak / GIB}


def measure(folder: pathlib.Path, config: ModelConfig) -> dict[str, Any]:
    source, target, back = folder / "source", folder / "target", folder / "back"
    make_source(source, config)
    size = sum(file.stat().st_size for file in source.iterdir())
    result: dict[str, Any] = {"gib": size / GIB, "copy_seconds": timed(lambda: copy(source, folder / "copy"))}
    result["convert"] = run("irg_jax.convert", "--source", str(source), "--target", str(target))
    before = digests(source)
    shutil.rmtree(source)
    result["export"] = run("irg_jax.export", "--checkpoint", str(target), "--format", "bagel", "--out",
                           str(back))
    result["export_is_the_source"] = digests(back) == before
    for name in ("convert", "export"):
        result[name]["times_copy"] = result[name]["seconds"] / result["copy_seconds"]
    return result


def main(values: Any) -> None:
    result = {"benchmark": "convert", "layers": values.layers,
              **machine.describe("numpy", "jax", "orbax-checkpoint", "safetensors")}
    with tempfile.TemporaryDirectory(dir=values.folder) as name:
        result |= measure(pathlib.Path(name), release(values.layers))
    machine.keep(result, values.out)


if __name__ == "__main__":
    flags.DEFINE_integer("layers", 28, "Layers of the language model; 28 is the release.", lower_bound=1)
    flags.DEFINE_string("folder", None, "Where there is room; by default the system's temporary folder.")
    flags.DEFINE_string("out", str(machine.RESULTS / "convert.json"), "The result file.")
    command.run(main)
