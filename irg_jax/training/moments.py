"""The frozen encoder's moments of a data set, computed once; `data_pipelines.moments` has the format."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from data_pipelines import images
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.datasets import Source, open_source
from data_pipelines.digests import write_text
from data_pipelines.jobs import default_workers, map_ahead
from data_pipelines.moments import Layout, describe, read_manifest, vae_parts, write_manifest, write_shard
from data_pipelines.samples import Kind, image_rule
from irg_jax.checkpoints import names
from irg_jax.checkpoints.model import Model
from irg_jax.checkpoints.store import digest
from irg_jax.models.functional import Functional
from irg_jax.models.irg import make_autoencoder
from irg_jax.training.losses import encode_image

SHARD = 512   # records a file, and what a kill costs at most


class Canvas(NamedTuple):
    """One image top left on a square canvas: uint8 [G, 16 * 16 * 3], and its size in tokens."""

    pixels: np.ndarray
    height: int
    width: int


def vae_digest(model: Model) -> str:
    """sha256 of the autoencoder's geometry and weights: which encoder the moments are of."""
    leaves = {path: digest(leaf) for path, leaf in names.flatten(model.vae).items()}
    text = json.dumps([dataclasses.asdict(model.config.vae), leaves], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_moments(config: DataConfig, model: Model) -> None:
    """Raises ValueError if the data's moments are of another autoencoder than the model's."""
    if config.moments and read_manifest(config.moments)["vae"] != vae_digest(model):
        raise ValueError(f"{config.moments} holds moments of another autoencoder; run "
                         "python -m irg_jax.moments with this checkpoint")


class Encoder:
    """Canvases -> moments, `batch_size` at a time over all devices of this process."""

    def __init__(self, model: Model, config: DataConfig, *, batch_size: int, dtype: str):
        self.side = config.canvas
        self.patch, self.batch_size = config.latent_patch, batch_size
        # On processors one batch keeps little more than a core busy; elsewhere the next is got ready meanwhile.
        self.at_once = min(default_workers(), 4) if jax.default_backend() == "cpu" else 2
        mesh = jax.sharding.Mesh(jax.local_devices(), ("images",))
        if batch_size < 1 or batch_size % mesh.size:
            raise ValueError(f"batch_size is {batch_size}; make it a positive multiple of the {mesh.size} "
                             "devices here")
        spread, copied = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
                          for axes in (("images",), ()))
        vae = Functional(lambda rngs: make_autoencoder(model.config, rngs=rngs))
        self._params = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), model.vae), copied)
        one = lambda params, canvas: encode_image(vae.bind(params), *canvas, jnp.dtype(dtype))
        self._encode = jax.jit(jax.vmap(one, in_axes=(None, 0)), in_shardings=(copied, spread),
                               out_shardings=spread)

    def place(self, image: np.ndarray) -> Canvas:
        """uint8 [H, W, 3], sides multiples of the latent patch, onto the canvas."""
        height, width = (side // self.patch for side in image.shape[:2])
        canvas = np.zeros((self.side * self.patch, self.side * self.patch, 3), np.uint8)
        canvas[:image.shape[0], :image.shape[1]] = image
        return Canvas(images.patchify(canvas, self.patch), height, width)

    def __call__(self, canvases: list[Canvas]) -> list[np.ndarray]:
        """float32 [h, w, 2 * Z] of each."""
        blank = Canvas(np.zeros_like(canvases[0].pixels), 1, 1)
        full = canvases + [blank] * (self.batch_size - len(canvases))
        moments = np.asarray(self._encode(self._params, Canvas(*(np.stack(field) for field in zip(*full)))))
        grid = moments.reshape(self.batch_size, self.side, self.side, -1)
        return [grid[i, :canvas.height, :canvas.width] for i, canvas in enumerate(canvases)]


def compute_moments(config: DataConfig, model: Model, out: pathlib.Path, *, dtype: str = "bfloat16",
                    store: str = "float16", batch_size: int = 8) -> int:
    """Writes the moments of every group's records to `out`; finished files are kept, so it resumes.

    Each process of several takes its share of the files; the first writes the manifest, which is what
    makes the folder usable. Returns how many records, of those read now, could not be: their entries are
    empty, and training meets, counts and names them as it does without moments.

    Raises: ValueError if `out` holds moments of something else.
    """
    sources = {group.name: open_source(config, group) for group in config.groups}
    layout = Layout(2 * model.config.latent_channels, store)
    inputs = {"layout": layout._asdict(), "vae": vae_digest(model), "dtype": dtype,
              "groups": {group.name: describe(config, group, digest=sources[group.name].digest)
                         for group in config.groups}}
    claim(out, inputs)
    encoder = Encoder(model, config, batch_size=batch_size, dtype=dtype)
    bad = 0
    total = sum(map(len, sources.values()))
    with tqdm.tqdm(total=total, desc="moments", unit="record", mininterval=1.0) as bar:
        for group in config.groups:
            source = sources[group.name]
            for number, start in enumerate(range(0, len(source), SHARD)):
                path = out / group.name / f"{number:05d}.array_record"
                indices = range(start, min(start + SHARD, len(source)))
                if not path.exists() and number % jax.process_count() == jax.process_index():
                    bad += write_shard(path, encode_records(source, indices, group, config, encoder), layout)
                bar.update(len(indices))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("moments")
    if jax.process_index() == 0:
        write_manifest(out, inputs, shard=SHARD, counts={name: len(source) for name, source in sources.items()})
    return bad


def claim(out: pathlib.Path, inputs: dict[str, Any]) -> None:
    """Notes what `out` is made from before anything is computed. Raises ValueError if it is something else."""
    path = out / "inputs.json"
    text = json.dumps(inputs, indent=1, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{out} holds moments of other data or another autoencoder; choose another --out, or "
                         "remove it")
    write_text(path, text)


def encode_records(source: Source, indices: range, group: GroupConfig, config: DataConfig,
                   encoder: Encoder) -> Iterator[list[np.ndarray] | None]:
    """For each record the moments of its VAE images in order; None for one that cannot be read."""
    def load(index: int) -> list[Canvas] | None:
        try:
            record = source[index]
            transform = image_rule(Kind.NOISED, config, group)[0]
            decode = lambda part: images.decode_image(part.data, where=part.place,
                                                      max_pixels=config.max_image_pixels)
            return [encoder.place(images.resize(decode(part), transform)) for part in vae_parts(record)]
        except ValueError as error:
            tqdm.tqdm.write(f"left out: {error}")
            return None

    options = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=2 * encoder.batch_size)
    # Grain drops elements that are None, so a record travels in a tuple.
    loaded = grain.MapDataset.source(indices).map(lambda index: (load(index),)).to_iter_dataset(options)
    yield from encode_in_order((record for (record,) in loaded), encoder)


def encode_in_order(records: Iterable[list[Canvas] | None],
                    encoder: Encoder) -> Iterator[list[np.ndarray] | None]:
    """Each record's moments, in order. Batches are full, wherever records end; some are encoded at once."""
    counts: collections.deque[int | None] = collections.deque()    # of records whose moments are yet to come

    def canvases() -> Iterator[Canvas]:
        for record in records:
            counts.append(None if record is None else len(record))
            yield from record or ()

    stream, ready = canvases(), collections.deque()
    batches = iter(lambda: list(itertools.islice(stream, encoder.batch_size)), [])
    with ThreadPoolExecutor(encoder.at_once) as pool:
        for moments in map_ahead(pool, encoder, batches, ahead=encoder.at_once):
            ready.extend(moments)
            yield from _take_whole(counts, ready)
    yield from _take_whole(counts, ready)


def _take_whole(counts: collections.deque[int | None],
                ready: collections.deque[np.ndarray]) -> Iterator[list[np.ndarray] | None]:
    """Takes the first records, as many as are ready to the last image."""
    while counts and (counts[0] or 0) <= len(ready):
        count = counts.popleft()
        yield None if count is None else [ready.popleft() for _ in range(count)]
