"""How fast records become packs, how long a step waits for them, and how soon training can begin.

    python benchmarks/data.py [--seconds 20] [--step_seconds 2] [--records 300000]

Records are those of the last learning mode (two images of 1024 px, three texts) with generated pixels,
once as JPEG and once as PNG. Rates are per core: processor seconds of one thread, so that other work on
the machine does not count. Prints one JSON object last and keeps it in benchmarks/results/data.json.
"""

import base64
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
from absl import app, flags
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from data_pipelines import images  # noqa: E402
from data_pipelines.config import DataConfig, GroupConfig  # noqa: E402
from data_pipelines.pipeline import Packs, make_iterator  # noqa: E402
from data_pipelines.planning import Planner  # noqa: E402
from data_pipelines.simulation import MODES, simulate  # noqa: E402
from data_pipelines.tokenizer import train_tokenizer  # noqa: E402

RESULT = pathlib.Path(__file__).parent / "results" / "data.json"
SIDE, RECORDS = 1024, 12
WORDS = "two red circles left of a blue square under three green stars in soft morning light".split()
FORMATS = {"jpeg": dict(format="JPEG", quality=92), "png": dict(format="PNG")}


def draw_image(rng: np.random.Generator) -> Image.Image:
    """Soft shapes and a little grain: compresses about as a photograph does."""
    small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    soft = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 3, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8))


def encode(rng: np.random.Generator, **options) -> bytes:
    buffer = io.BytesIO()
    draw_image(rng).save(buffer, **options)
    return buffer.getvalue()


def record(rng: np.random.Generator, **options) -> str:
    """A record of improving_full: prompt, think1, image1, think2*, image2*."""
    text = lambda words, **flags: {"type": "text", "content": " ".join(rng.choice(WORDS, words)), **flags}
    image = lambda **flags: {"type": "image", **flags,
                             "content": base64.b64encode(encode(rng, **options)).decode()}
    return json.dumps([{"role": "user", "content": text(40)["content"]},
                       {"role": "assistant", "content": [
                           text(180, need_loss=False), image(need_vae=True, need_vit=True), text(320),
                           image(need_loss=True)]}])


def write(folder: pathlib.Path, rows: list[str], *, rows_per_group: int) -> None:
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"conversation": rows}), folder / "0000.parquet",
                                row_group_size=rows_per_group, compression="zstd", write_page_checksum=True)


def measure(function: Callable[[], object], *, seconds: float) -> float:
    """Processor seconds of one call, on average; the first is not counted."""
    function()
    begun, calls = time.thread_time(), 0
    while calls < 3 or time.thread_time() - begun < seconds:
        function()
        calls += 1
    return (time.thread_time() - begun) / calls


def measure_images(options: dict, config: DataConfig, seconds: float) -> dict[str, float]:
    """Milliseconds of one image through both encoders' transforms, by stage."""
    data = encode(np.random.default_rng(0), **options)
    decode = lambda: images.decode_image(data, where="", max_pixels=config.max_image_pixels)
    stages = {"decode": decode}
    for name, transform, patch in (("vae", config.vae_transform, config.latent_patch),
                                   ("vit", config.vit_transform, config.vit_patch)):
        resized = images.resize(decode(), transform)
        into = images.patchify(resized, patch)
        stages[f"resize_{name}"] = lambda transform=transform, image=decode(): images.resize(image, transform)
        stages[f"patchify_{name}"] = lambda image=resized, patch=patch, into=into: images.write_patches(
            image, patch, into)
    times = {name: measure(stage, seconds=seconds / 8) for name, stage in stages.items()}
    return {"encoded_kib": len(data) / 1024, **{f"{name}_ms": value * 1e3 for name, value in times.items()},
            "images_per_second_per_core": 1 / sum(times.values())}


def measure_packs(config: DataConfig, tokenizer, seconds: float) -> dict[str, float]:
    """Whole packs from parquet: read, parse, decode, resize, assemble."""
    packs, index = Packs(config, tokenizer), iter(range(2**30))
    value = measure(lambda: packs.load(next(index)), seconds=seconds)
    per_pack = 2 * np.mean([len(packs.planner[i].entries) for i in range(next(index))])
    return {"pack_seconds": value, "images_per_pack": per_pack, "images_per_second_per_core": per_pack / value}


def measure_wait(config: DataConfig, tokenizer, seconds: float, step: float) -> dict[str, float]:
    """What `next` takes while a device would compute for `step` seconds, and the memory held meanwhile."""
    begun = time.perf_counter()
    iterator = make_iterator(config, tokenizer)
    next(iterator)
    first, waits = time.perf_counter() - begun, []
    for _ in range(max(5, int(seconds / step))):
        time.sleep(step)
        asked = time.perf_counter()
        batch = next(iterator)
        waits.append(time.perf_counter() - asked)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory = sum(process.memory_full_info().pss for process in family) / 2**20
    iterator.close()
    return {"first_batch_seconds": first, "mean_wait_seconds": float(np.mean(waits)),
            "max_wait_seconds": max(waits), "memory_mib": memory,
            "batch_mib": sum(np.asarray(array).nbytes for field in batch
                             for array in (field if isinstance(field, tuple) else (field,))) / 2**20}


def measure_start(folder: pathlib.Path, tokenizer, records: int) -> dict[str, float]:
    """From nothing to a first batch, over short texts; and a first plan over simulated IRGL records."""
    modes = {mode: GroupConfig(mode) for mode in MODES}
    for mode in modes:
        rows = [json.dumps([{"role": "user", "content": f"{mode} {i} {WORDS[i % len(WORDS)]}"}])
                for i in range(records // len(modes))]
        write(folder / "train" / mode, rows, rows_per_group=1000)
    config = DataConfig(source=str(folder), groups=tuple(modes.values()), index_dir=str(folder / "index"),
                        packs_per_step=1, text_tokens=64)  # four records a pack, as with images
    result = {"records": records}
    for name in ("first_start_seconds", "start_seconds"):
        begun = time.perf_counter()
        iterator = make_iterator(config, tokenizer)
        next(iterator)
        result[name] = time.perf_counter() - begun
        result["state_bytes"] = len(json.dumps(iterator.get_state()))
        result["position_bytes"] = len(json.dumps(iterator.position(1)))
        iterator.close()
    tables = simulate(config, records=records // len(modes))
    begun = time.perf_counter()
    Planner(dataclasses.replace(config, text_tokens=8192), tables)[0]
    return result | {"plan_simulated_seconds": time.perf_counter() - begun}


def machine() -> dict[str, object]:
    versions = {name: importlib.metadata.version(name) for name in ("grain", "numpy", "pillow", "pyarrow")}
    info = pathlib.Path("/proc/cpuinfo")
    names = {line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")} if info.exists() else {platform.processor()}
    return {"date": datetime.date.today().isoformat(), "cpu": ", ".join(sorted(names)), "cores": os.cpu_count(),
            "python": platform.python_version(), **versions}


def main(argv: list[str]) -> None:
    values, result = flags.FLAGS, {"benchmark": "data", **machine()}
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, vocab_size=400)
    with tempfile.TemporaryDirectory() as name, tqdm(total=9, desc="benchmark", disable=None) as bar:
        folder = pathlib.Path(name)
        for kind, options in FORMATS.items():
            rng = np.random.default_rng(0)
            write(folder / kind / "train" / "improving_full",
                  [record(rng, **options) for _ in range(RECORDS)], rows_per_group=4)
            config = DataConfig(source=str(folder / kind), groups=(GroupConfig("improving_full"),),
                                packs_per_step=1, index_dir=str(folder / kind / "index"))
            result[kind] = measure_images(options, config, values.seconds)
            bar.update()
            result[f"{kind}_packs"] = measure_packs(config, tokenizer, values.seconds)
            bar.update()
            for workers in (0, 1):
                reading = dataclasses.replace(config, workers=workers, read_threads=2, prefetch=2)
                result[f"{kind}_wait_{workers}_workers"] = measure_wait(
                    reading, tokenizer, values.seconds, values.step_seconds)
                bar.update()
        result["start"] = measure_start(folder / "start", tokenizer, values.records)
        bar.update()
    result["step_seconds"] = values.step_seconds
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    flags.DEFINE_float("seconds", 20, "Roughly what each measurement takes.", lower_bound=1)
    flags.DEFINE_float("step_seconds", 2, "What the device needs for a step of one pack.", lower_bound=0)
    flags.DEFINE_integer("records", 300_000, "Records of the start-up measurement.", lower_bound=6)
    app.run(main)
