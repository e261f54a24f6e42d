"""Rows and the dense definition, for tests of attention, and TPUs that are not here."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice

from data_pipelines.batch import INF, Rows, padding_rows, visible
from irg_jax.parallel.sharding import MeshConfig, make_abstract_mesh


def random_rows(rng: np.random.Generator, batch: int, length: int) -> Rows:
    """Samples of text and images, one after the other, then padding; some packs are nothing but padding."""
    rows = Rows(*(np.zeros((batch, length), bool if name == "noised" else np.int32) for name in Rows._fields))
    for pack in range(batch):
        rows.order[pack], rows.first[pack], rows.last[pack] = INF, INF, -1
        at = 0
        while (size := int(rng.integers(1, 7))) <= length - at and rng.random() > 0.1:
            span = slice(at, at + size)
            index = np.arange(at, at + size)
            is_image, starts = rng.random() < 0.5, at == 0 or rng.random() < 0.4
            rows.order[pack, span] = index
            rows.first[pack, span] = at if starts else rows.first[pack, at - 1]
            rows.span[pack, span] = at if is_image else index
            rows.last[pack, span] = at + size - 1 if is_image else index
            rows.noised[pack, span] = is_image and rng.random() < 0.5
            at += size
    return rows


def dense(query, key, value, query_rows, key_rows):
    """The definition, with all scores at once."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    score = jnp.einsum("bsnh,bcnh->bnsc", query, key) / np.sqrt(query.shape[3])
    seen = visible(query_rows, key_rows)[:, None]
    weight = jnp.where(seen, jnp.exp(score - jax.lax.stop_gradient(score.max(-1, keepdims=True))), 0)
    total = weight.sum(-1, keepdims=True)
    return jnp.einsum("bnsc,bcnh->bsnh", weight / jnp.where(total > 0, total, 1), value)


def gradients(function, inputs, weight):
    """Value, and the gradients of its product with `weight`."""
    out, backward = jax.vjp(function, *inputs)
    return out, *backward(weight.astype(out.dtype))


def on_tpus(mesh: MeshConfig, kind: str = "TPU v5p"):
    """A context in which kernels may be lowered: from jax 0.11 on that needs to know the TPU by name."""
    named = make_abstract_mesh(mesh, math.prod(dataclasses.astuple(mesh)))
    return jax.sharding.use_abstract_mesh(named.update(abstract_device=AbstractDevice(kind, 1, "tpu")))


def padding(batch: int, length: int) -> Rows:
    return padding_rows((batch, length))


def one_image(batch: int, length: int, noised: bool = False) -> Rows:
    """One sample that fills the pack, and that is one image."""
    full = lambda value: np.full((batch, length), value, np.int32)
    order = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return Rows(order, full(0), full(0), full(length - 1), full(noised).astype(bool), full(0))
