"""Attention under the visibility rule of `data_pipelines.batch`: one function, on any device.

Axes: B packs, S queries, C keys, N query heads, K key-value heads, R = N / K, H head size.

What depends on the rows alone (who sees whom, tile by tile) is a `Sight`, made once and shared by all layers.
Memory is linear in S and C: for the backward pass a query keeps its output and one number a head, and scores
are computed again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from data_pipelines.batch import Rows
from irg_jax.kernels import blockwise, hopper, hopper_backward, tpu
from irg_jax.kernels.tiles import key_integers, list_work, map_tiles, pad_rows, query_integers

IMPLEMENTATIONS = ("auto", "pallas", "xla")
ATTENDED = "attended"   # what a rematerialisation policy may keep, by this name
TILE = 512          # queries and keys of a tile; why: docs/performance.md
MAX_HEAD = 128      # of the fused kernel; the autoencoder's one head of 512 takes XLA
MIN_QUERIES = 128   # a token that is decoded, or a short text, is no work for it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """Who sees whom: rows of queries [B, S] and of keys [B, C], and the work of the kernels.

    That for Hopper GPUs is there if programs are compiled for them; what a program does not use, jit drops.
    """

    query: Rows
    key: Rows
    work: tpu.Work
    on_hopper: Any = ()    # or hopper.Work
    tile: int = dataclasses.field(default=TILE, metadata={"static": True})    # of `work`


def look(query: Rows, key: Rows, tile: int = TILE, for_hopper: bool | None = None) -> Sight:
    """Prepares attention of queries [B, S] over keys [B, C], for any number of layers.

    Args: for_hopper tells whether CUDA means a Hopper GPU; by default the devices here are asked, so that a
        program that is lowered elsewhere takes XLA.
    Raises: ValueError if the rows have more tiles than a list of work can name.
    """
    padded = pad_rows(query, tile), pad_rows(key, tile)
    entries, count = list_work(*map_tiles(*padded, tile))
    work = tpu.Work(entries, count, query_integers(padded[0]), key_integers(padded[1]))
    if for_hopper is None:
        for_hopper = hopper.is_present()
    return Sight(query, key, work, hopper.prepare(query, key) if for_hopper else (), tile)


def attend(query: Float[Array, "B S N H"], key: Float[Array, "B C K H"], value: Float[Array, "B C K H"],
           sight: Sight, implementation: str = "auto") -> Float[Array, "B S N H"]:
    """softmax(q k / sqrt(H)) v over the visible keys; N / K queries share a key head.

    A query that sees nothing (padding) gets zeros.

    Args: implementation "xla" is blocks of queries in plain XLA; "pallas" is the fused kernel, which a CPU
        interprets (slow; for tests); "auto" is the kernel where the program is compiled for a TPU or a Hopper
        GPU and the kernel is made for its sizes, and XLA elsewhere.
    Raises: ValueError if there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    length, _, size = query.shape[1:]
    if not length:   # a stream without tokens, e.g. `vit_tokens` is 0
        return query
    if implementation == "auto" and (length < MIN_QUERIES or size > MAX_HEAD):
        implementation = "xla"
    # Heads lead, and those that share a key head stand one below the other: one plain matmul a key head.
    query = rearrange(query * size**-0.5, "b s (k r) h -> b k r s h", k=key.shape[2])
    key, value = (rearrange(x, "b c k h -> b k c h") for x in (key, value))
    return rearrange(_attend(implementation, query, key, value, sight), "b k r s h -> b s (k r) h")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(implementation: str, query, key, value, sight: Sight):
    """Scaled queries [B K R S H], keys and values [B K C H] -> [B K R S H]."""
    return _forward(implementation, query, key, value, sight)[0]


def _forward(implementation, query, key, value, sight: Sight):
    passes = blockwise.forward, tpu.forward, hopper.forward
    out, logsum = _choose(implementation, sight, passes, query, key, value)
    out, logsum = checkpoint_name(out, ATTENDED), checkpoint_name(logsum, ATTENDED)
    return out, (query, key, value, sight, out, logsum)


def _backward(implementation, saved, d_out):
    query, key, value, sight, out, logsum = saved
    # What the sum of weights takes back: sum over keys of weight * d_weight, which is d_out . out.
    share = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)
    passes = blockwise.backward, tpu.backward, hopper_backward.backward
    d_query, d_key, d_value = _choose(implementation, sight, passes, query, key, value, d_out, logsum, share)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _choose(implementation: str, sight: Sight, passes: tuple[Callable, Callable, Callable], *heads: Array):
    """One of three functions of the same arrays, by the platform that the program is compiled for."""
    plain, for_tpu, for_hopper = passes
    by_blocks = lambda *heads: plain(*heads, sight.query, sight.key)
    by_tpu = lambda interpret: lambda *heads: for_tpu(*heads, sight.work, tile=sight.tile, interpret=interpret)
    if implementation == "xla":
        return by_blocks(*heads)
    elsewhere = by_blocks if implementation == "auto" else by_tpu(True)
    fits = sight.on_hopper and all(hopper.accepts(x.shape[-1], x.dtype) for x in heads[:3])
    by_hopper = lambda *heads: for_hopper(*heads, sight.on_hopper)
    return jax.lax.platform_dependent(*heads, tpu=by_tpu(False), cuda=by_hopper if fits else elsewhere,
                                      default=elsewhere)
