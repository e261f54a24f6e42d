"""Attention of all streams together: the one place where they are one sequence.

They are joined on each device by itself, as [its text | its vit | its latent]: what a token sees is written in
its integers, so the order in which tokens lie is free, and joining costs no communication. Under context
parallelism queries stay where they are, and the keys and values of a pack are gathered.

Axes: B packs, S or _ tokens of a stream, C past tokens, N heads, K key-value heads, H head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

from einops import rearrange
from jaxtyping import Array, Float

from data_pipelines.batch import Rows
from irg_jax.kernels.attention import TILE, Sight, attend, look
from irg_jax.kernels.tiles import pad_axis, pad_rows
from irg_jax.kernels.tpu import Work
from irg_jax.models.streams import join, join_rows, split
from irg_jax.parallel.shards import Axes, count_ways, gather, per_shard


class KeyValue(NamedTuple):
    """Rotated keys and values of tokens: [L, B, K, C, H] each (without L inside a layer).

    Heads come before tokens, as attention takes them: otherwise a program that draws after a context copies it.
    """

    key: Float[Array, "*L B K C H"]
    value: Float[Array, "*L B K C H"]

    @classmethod
    def of(cls, key: Float[Array, "B C K H"], value: Float[Array, "B C K H"]) -> "KeyValue":
        return cls(*(rearrange(x, "b c k h -> b k c h") for x in (key, value)))


def _rows(axes: Axes) -> Rows:
    return Rows(*[axes] * len(Rows._fields))


_PACKS = Axes("packs")


def _sight(tokens: str | None) -> Sight:
    """Each device has a list of work of its own, for its own queries."""
    split = Axes("packs", tokens)
    return Sight(query=_rows(split), key=_rows(_PACKS),
                 work=Work(entries=split, count=split, query=Axes("packs", None, tokens), key=_PACKS),
                 on_hopper=Axes("packs", None, tokens))


def _split_axis(streams: Sequence[Array]) -> str | None:
    """The axis of tokens where it deals all streams evenly; else every device has all, as of a short text."""
    return "tokens" if all(x.shape[1] % count_ways("tokens") == 0 for x in streams) else None


def look_together(streams: tuple[Rows, ...], past: Rows | None = None) -> Sight:
    """Who sees whom among all tokens of some streams of rows [B, S], and of `past` [B, C]."""
    tokens = _split_axis([rows.order for rows in streams])

    def local(streams, past):
        query = join_rows([pad_rows(rows, _tile(rows.order)) for rows in streams])
        key = Rows(*(gather(row, 1, tokens) for row in query))
        return look(query, key if past is None else join_rows((past, key)))
    return per_shard(local, (Axes("packs", tokens), _PACKS), _sight(tokens))(streams, past)


def attend_together(query: tuple[Float[Array, "B _ N H"], ...], key: tuple[Float[Array, "B _ K H"], ...],
                    value: tuple[Float[Array, "B _ K H"], ...], sight: Sight, past: KeyValue | None = None,
                    heads: str | None = None) -> tuple[Float[Array, "B _ N H"], ...]:
    """`attend`, stream by stream; `heads` is the logical axis of heads where they are split."""
    tokens = _split_axis(query)

    def local(query, key, value, sight, past):
        whole = [pad_axis(x, 1, _tile(x)) for x in query]
        keys = [gather(join([pad_axis(x, 1, _tile(x)) for x in parts]), 1, tokens) for parts in (key, value)]
        if past is not None:
            past = [rearrange(x, "b k c h -> b c k h") for x in past]
            keys = [join((old.astype(new.dtype), new)) for old, new in zip(past, keys)]
        attended = split(attend(join(whole), *keys, sight), whole)
        return tuple(out[:, :x.shape[1]] for out, x in zip(attended, query))
    of_tokens, of_past = Axes("packs", tokens, heads), Axes("packs", heads)
    return per_shard(local, (of_tokens, of_tokens, of_tokens, _sight(tokens), of_past), of_tokens)(
        query, key, value, sight, past)


def _tile(stream: Array) -> int:
    """What a stream is padded to: a tile that is half one stream and half another would see nearly all keys."""
    return TILE if stream.shape[1] > TILE else 1
