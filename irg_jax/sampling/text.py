"""Writes a text after each of B contexts, all at once, in one compiled loop.

Axes: B contexts, M the longest text, W vocabulary.
Source: `generate_text` of BAGEL's modeling/bagel/bagel.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from irg_jax.models.irg import IRG
from irg_jax.sampling.cache import Context, append_text
from irg_jax.sampling.config import TextConfig


class Written(NamedTuple):
    """Texts as they were fed back: the opening bracket first, the closing one left out.

    Of each row the first `lengths` count; those that are not `is_done` were cut there. `logits` follow each of
    these tokens; None unless asked.
    """

    ids: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    is_done: Bool[Array, "B"]    # the closing bracket came
    logits: Float[Array, "B M W"] | None


class Writing(NamedTuple):
    """Texts under way. Their contexts go with them, and are thrown away at the end.

    For a text is decoded, tokenised again and read as a block of its own.
    """

    step: Int[Array, ""]         # tokens of each text so far
    token: Int[Array, "B"]       # the next ones to be read
    written: Written


def begin_text(batch: int, *, bos: int, config: TextConfig, vocab_size: int | None = None) -> Writing:
    """Nothing is written yet. Logits are kept if `vocab_size` is given."""
    shape = (batch, config.max_length)
    logits = None if vocab_size is None else jnp.zeros((*shape, vocab_size))
    written = Written(jnp.zeros(shape, jnp.int32), jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool),
                      logits)
    return Writing(jnp.int32(0), jnp.full((batch,), bos, jnp.int32), written)


def write_on(model: IRG, context: Context, writing: Writing, keys: Key[Array, "B"], *, eos: int,
             config: TextConfig) -> tuple[Context, Writing]:
    """Decodes until every text has ended, `config.max_length` tokens are there, or the contexts are full.

    A text depends on its key and its context, not on its neighbours, nor on where contexts were full.
    """
    def body(state: tuple[Context, Writing]) -> tuple[Context, Writing]:
        context, (step, token, written) = state
        context, hidden = append_text(model, context, token[:, None], jnp.ones_like(token))
        logits = model.logits(hidden)[:, 0]
        following = _choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), config)
        written = Written(written.ids.at[:, step].set(token), written.lengths + ~written.is_done,
                          written.is_done | (following == eos),
                          None if written.logits is None else written.logits.at[:, step].set(logits))
        return context, Writing(step + 1, following, written)

    def is_going(state: tuple[Context, Writing]):
        context, writing = state
        return ((writing.step < config.max_length) & ~jnp.all(writing.written.is_done)
                & (context.view.length < context.view.capacity))
    view = context.view._replace(length=jnp.asarray(context.view.length, jnp.int32))
    return jax.lax.while_loop(is_going, body, (context._replace(view=view), writing))


def _choose(logits: Float[Array, "B W"], keys: Key[Array, "B"], config: TextConfig
            ) -> Int[Array, "B"]:
    if not config.do_sample:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    sample = lambda key, row: jax.random.categorical(key, row / config.temperature)
    return jax.vmap(sample)(keys, logits).astype(jnp.int32)
