"""How fast records become packs, how long a step waits for them, and how soon training can begin.

    python -m benchmarks.data [--seconds 20] [--step_seconds 2] [--records 300000]

Records are those of the last learning mode (two images of 1024 px, three texts) with generated pixels,
once as JPEG and once as PNG. Rates are per core: processor seconds of one thread, the least over several
rounds, so that other work on the machine counts little. The limit of a pack is what Pillow needs to decode
and resize its images, and nothing else; a chip wants 1 to 3 images a second. Prints one JSON object last
and writes it to benchmarks/results/data.json.
"""

import base64
import dataclasses
import io
import itertools
import json
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
from absl import flags
from PIL import Image
from tqdm import tqdm

from benchmarks import machine
from data_pipelines import command, images
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.conversion import convert
from data_pipelines.pipeline import Packs, make_iterator
from data_pipelines.planning import Planner
from data_pipelines.simulation import MODES, simulate
from data_pipelines.tokenizer import Tokenizer, train_tokenizer

SIDE, RECORDS = 1024, 12
ROUND = 8     # packs
SHARDS = 200  # of a mode: 300 GB in shards of 256 MiB are 1,200 files
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


def measure(function: Callable[[], object], *, seconds: float, calls: int = 1) -> float:
    """Processor seconds of a call in the best of several rounds of `calls`; the first is not counted."""
    rounds, begun = [], time.thread_time()
    while len(rounds) < 4 or time.thread_time() - begun < seconds:
        start = time.thread_time()
        for _ in range(calls):
            function()
        rounds.append((time.thread_time() - start) / calls)
    return min(rounds[1:])


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


def measure_packs(config: DataConfig, tokenizer: Tokenizer, one: dict[str, float],
                  seconds: float) -> dict[str, float]:
    """Whole packs from parquet: read, parse, decode, resize, assemble. `one` is of `measure_images`."""
    packs, index = Packs(config, tokenizer), itertools.cycle(range(ROUND))
    value = measure(lambda: packs.load(next(index)), seconds=seconds, calls=ROUND)
    records = np.mean([len(packs.planner[i].entries) for i in range(ROUND)])
    limit = records * (2 * one["decode_ms"] + one["resize_vit_ms"]) / 1e3  # of two images one enters as ViT
    return {"pack_seconds": value, "packs_per_second_per_core": 1 / value, "images_per_pack": 2 * records,
            "images_per_second_per_core": 2 * records / value, "limit_pack_seconds": limit,
            "share_of_limit": limit / value}


def measure_wait(config: DataConfig, tokenizer: Tokenizer, seconds: float, step: float) -> dict[str, float]:
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


def first_batch(config: DataConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """Bytes of what the iterator keeps: its state, and with it all that a resume is compared with."""
    iterator = make_iterator(config, tokenizer)
    next(iterator)
    iterator.close()
    return {"state_bytes": len(json.dumps(iterator.get_state())),
            "position_bytes": len(json.dumps(iterator.position(1)))}


def start_up(config: DataConfig, tokenizer: Tokenizer) -> tuple[float, dict[str, int]]:
    """Seconds from nothing, Python itself included, to a first batch in a process of its own."""
    begun = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sizes = pool.apply(first_batch, (config, tokenizer))
        seconds = time.perf_counter() - begun
        pool.close()
        pool.join()
    return seconds, sizes


def write_texts(folder: pathlib.Path, tokenizer: Tokenizer, records: int) -> tuple[DataConfig, DataConfig]:
    """Short texts of all modes, as parquet and as a built data set."""
    each = records // len(MODES)
    for mode in MODES:
        words = (f"{mode} {i} {WORDS[i % len(WORDS)]}" for i in range(each))
        rows = [json.dumps([{"role": "user", "content": text, "need_loss": True}]) for text in words]
        write(folder / "parquet" / "train" / mode, rows, rows_per_group=-(-each // SHARDS))
    groups = tuple(map(GroupConfig, MODES))
    parquet = DataConfig(source=str(folder / "parquet"), groups=groups, packs_per_step=1,
                         index_dir=str(folder / "index"), text_tokens=64)  # four records a pack, as with images
    tokenizer.save(str(folder / "tokenizer.json"))
    convert(parquet.source, out=folder / "built", config=parquet, tokenizer=str(folder / "tokenizer.json"),
            decode=False, shard_mib=0)
    return parquet, dataclasses.replace(parquet, source=str(folder / "built"), index_dir="")


def measure_start(folder: pathlib.Path, tokenizer: Tokenizer, records: int) -> dict[str, float]:
    """Start-up over short texts: of a built data set, and of parquet, whose records are all read once."""
    parquet, built = write_texts(folder, tokenizer, records)
    each = records // len(MODES)
    result = {"records": each * len(MODES), "shards": len(list(folder.glob("built/train/*/*.array_record*")))}
    result["built_seconds"], sizes = start_up(built, tokenizer)
    result["parquet_first_seconds"], _ = start_up(parquet, tokenizer)
    result["parquet_again_seconds"], _ = start_up(parquet, tokenizer)
    tables = simulate(parquet, records=each)
    begun = time.perf_counter()
    Planner(dataclasses.replace(parquet, text_tokens=8192), tables)[0]
    return result | sizes | {"plan_simulated_seconds": time.perf_counter() - begun}


def main(values) -> None:
    result = {"benchmark": "data", **machine.describe("grain", "numpy", "pillow", "pyarrow", "array_record"),
              "step_seconds": values.step_seconds}
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
            result[f"{kind}_packs"] = measure_packs(config, tokenizer, result[kind], values.seconds)
            bar.update()
            for workers in (0, 1):
                reading = dataclasses.replace(config, workers=workers, read_threads=2, prefetch=2)
                result[f"{kind}_wait_{workers}_workers"] = measure_wait(
                    reading, tokenizer, values.seconds, values.step_seconds)
                bar.update()
        result["start"] = measure_start(folder / "start", tokenizer, values.records)
        bar.update()
    machine.keep(result, values.out)


if __name__ == "__main__":
    flags.DEFINE_float("seconds", 20, "Roughly what each measurement takes.", lower_bound=1)
    flags.DEFINE_float("step_seconds", 2, "What the device needs for a step of one pack.", lower_bound=0)
    flags.DEFINE_integer("records", 300_000, "Records of the start-up measurement.", lower_bound=6)
    flags.DEFINE_string("out", str(machine.RESULTS / "data.json"), "The result file.")
    command.run(main)
