"""Precomputed moments: the latents that training would have computed, and what is refused."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_cases import make_model, make_tokenizer
from data_cases import data_config, write_data_set, write_rows
from data_pipelines.config import GroupConfig, ImageTransform
from data_pipelines.datasets import open_source
from data_pipelines.moments import Layout, Moments, decode_entry, describe, encode_entry
from data_pipelines.pipeline import Packs
from irg_jax.models.functional import Functional
from irg_jax.models.irg import make_autoencoder
from irg_jax.training import moments
from irg_jax.training.losses import LossConfig, encode_latents
from irg_jax.training.moments import check_moments, compute_moments, encode_in_order

MODEL = make_model(tokenizer=make_tokenizer())
PATCH = MODEL.config.pixels_per_token
VAE = Functional(lambda rngs: make_autoencoder(MODEL.config, rngs=rngs))
COUNTS = {"full": 5, "improving": 4}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Images of several sizes: a group's own transform is smaller than the mixture's."""
    folder = write_data_set(tmp_path_factory.mktemp("data"), counts=COUNTS)
    return data_config(
        source=str(folder), latent_patch=PATCH, vit_patch=4, max_latent_size=5, vit_max_side=6,
        latent_tokens=96, packs_per_step=1, vae_transform=ImageTransform(PATCH, 4 * PATCH, PATCH),
        vit_transform=ImageTransform(4, 12, 4),
        groups=(GroupConfig("full", vae_transform=ImageTransform(PATCH, 3 * PATCH, PATCH)),
                GroupConfig("improving")))


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("moments") / "out"
    assert compute_moments(config, MODEL, out, dtype="float32", store="float32", batch_size=8) == 0
    return out


def latents(batch, config, posterior):
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    encode = lambda params, batch: encode_latents(VAE.bind(params), batch, LossConfig(posterior=posterior),
                                                  config.canvas, jax.random.key(3), jnp.float32)
    return np.asarray(jax.jit(encode)(MODEL.vae, batch))[0], np.asarray(batch.latent_image)[0]


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_latents_are_those_of_the_encoder(config, folder, posterior):
    tokenizer = make_tokenizer()
    encoded, precomputed = (Packs(each, tokenizer) for each in (
        config, dataclasses.replace(config, moments=str(folder))))
    for index in range(3):
        pixels, table = latents(encoded[index], config, posterior)
        values, other = latents(precomputed[index], config, posterior)
        np.testing.assert_array_equal(table, other)
        real = table < config.images
        assert real.sum() > 20
        np.testing.assert_allclose(values[real], pixels[real], rtol=1e-4, atol=1e-4)
        assert precomputed[index].latent_pixels.shape[-1] == 0


def test_half_precision_keeps_three_digits(config, folder, tmp_path):
    compute_moments(config, MODEL, tmp_path, dtype="float32", store="float16", batch_size=8)
    whole, half = (Packs(dataclasses.replace(config, moments=str(each)), make_tokenizer())[0].latent_moments
                   for each in (folder, tmp_path))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half.astype(np.float32), whole, rtol=2**-10, atol=1e-6)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.array_record")}


def test_killed_work_goes_on(config, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "SHARD", 2)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    compute_moments(config, MODEL, whole, dtype="float32", batch_size=8)
    write = moments.write_shard
    def killed(path, entries, layout):
        if path.parent.name == "improving":
            raise KeyboardInterrupt
        return write(path, entries, layout)
    monkeypatch.setattr(moments, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        compute_moments(config, MODEL, torn, dtype="float32", batch_size=8)
    with pytest.raises(ValueError, match="batch_size is 0; make it a positive multiple"):
        compute_moments(config, MODEL, torn, dtype="float32", batch_size=0)
    with pytest.raises(ValueError, match="moments.json is no manifest of moments"):
        Packs(dataclasses.replace(config, moments=str(torn)), make_tokenizer())
    done = {path: path.stat().st_mtime_ns for path in torn.rglob("*.array_record")}
    assert len(done) == 3
    monkeypatch.setattr(moments, "write_shard", write)
    compute_moments(config, MODEL, torn, dtype="float32", batch_size=8)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    one, other = (Packs(dataclasses.replace(config, moments=str(out)), make_tokenizer())[0]
                  for out in (whole, torn))
    np.testing.assert_array_equal(one.latent_moments, other.latent_moments)


class SlowEncoder:
    """Stands for an encoder: the later a batch begins, the sooner it may be done."""

    def __init__(self, batch_size: int, at_once: int, seconds: list[float]):
        self.batch_size, self.at_once, self._seconds, self.sizes = batch_size, at_once, seconds, []

    def __call__(self, canvases: list[int]) -> list[int]:
        self.sizes.append(len(canvases))
        time.sleep(self._seconds[canvases[0] % len(self._seconds)])
        return [-canvas for canvas in canvases]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.integers(0, 5), max_size=15), st.integers(1, 6), st.integers(1, 3),
       st.lists(st.floats(0, 2e-3), min_size=1, max_size=5))
def test_records_keep_their_images_however_they_are_batched(counts, batch_size, at_once, seconds):
    numbers = iter(range(1, 100))
    records = [None if count is None else [next(numbers) for _ in range(count)] for count in counts]
    encoder = SlowEncoder(batch_size, at_once, seconds)
    told = list(encode_in_order(iter(records), encoder))
    assert told == [record and [-number for number in record] for record in records]
    total = sum(filter(None, counts))
    assert len(encoder.sizes) == -(-total // batch_size) and max(encoder.sizes, default=0) <= batch_size


def test_moments_of_something_else_are_refused(config, folder, tmp_path):
    other = dataclasses.replace(config, moments=str(folder),
                                vae_transform=ImageTransform(PATCH, 2 * PATCH, PATCH))
    with pytest.raises(ValueError, match="improving was computed from something else: vae_transform differ"):
        Packs(other, make_tokenizer())
    with pytest.raises(ValueError, match="holds moments of other data or another autoencoder"):
        compute_moments(config, make_model(seed=1), folder, dtype="float32", batch_size=8)
    check_moments(dataclasses.replace(config, moments=str(folder)), MODEL)
    with pytest.raises(ValueError, match="moments of another autoencoder"):
        check_moments(dataclasses.replace(config, moments=str(folder)), make_model(seed=1))
    more = dataclasses.replace(config, moments=str(folder), groups=(*config.groups, GroupConfig("think")))
    write_data_set(tmp_path, counts={**COUNTS, "think": 2})
    with pytest.raises(ValueError, match="no moments of group 'think'"):
        Packs(dataclasses.replace(more, groups=more.groups[2:], source=str(tmp_path)), make_tokenizer())


def test_an_unreadable_record_is_counted_and_its_entry_is_empty(config, tmp_path):
    source = write_data_set(tmp_path / "data", counts=COUNTS)
    path = source / "train" / "full" / "0002.parquet"
    write_rows(path, ["not a conversation"])
    broken = dataclasses.replace(config, source=str(source))
    assert compute_moments(broken, MODEL, tmp_path / "out", dtype="float32", batch_size=8) == 1
    assert json.loads((tmp_path / "out" / "moments.json").read_text())["groups"]["full"]["files"] == {
        "00000.array_record": 6}


def test_flipped_bytes_are_errors_or_harmless(config, tmp_path):
    compute_moments(config, MODEL, tmp_path, dtype="float32", store="float32", batch_size=8)
    group = config.groups[1]
    source = open_source(config, group)
    wanted = describe(config, group, digest=source.digest)
    read = lambda: [image for index in range(len(source))
                    for image in Moments(tmp_path, group, wanted=wanted).of(index, source[index]).values()]
    path, sound = tmp_path / "improving" / "00000.array_record", read()
    data, rng, caught = path.read_bytes(), np.random.default_rng(0), 0
    for position in rng.integers(len(data), size=24):
        spoiled = bytearray(data)
        spoiled[position] ^= 0x10
        path.write_bytes(spoiled)
        try:
            for one, other in zip(read(), sound, strict=True):
                np.testing.assert_array_equal(one, other)
        except ValueError:
            caught += 1
    assert caught > 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=4),
       st.sampled_from(["float16", "float32"]), st.integers(0, 60), st.randoms())
def test_entries_round_trip_and_cut_ones_are_refused(sizes, dtype, cut, random):
    layout = Layout(6, dtype)
    images = [np.full((*size, 6), random.random(), dtype) for size in sizes]
    data = encode_entry(images)
    for one, other in zip(images, decode_entry(data, layout, where="here"), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="here"):
        decode_entry(data[:len(data) - 1 - cut % len(data)], layout, where="here")
