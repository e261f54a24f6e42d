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

    Of each row the first `lengths` count. `logits` follow each of these tokens; None unless asked.
    """

    ids: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    logits: Float[Array, "B M W"] | None


class _State(NamedTuple):
    step: Int[Array, ""]
    context: Context
    token: Int[Array, "B"]
    is_done: Bool[Array, "B"]
    written: Written


def write_text(model: IRG, context: Context, keys: Key[Array, "B"], *, bos: int, eos: int,
               config: TextConfig, want_logits: bool = False) -> Written:
    """Decodes until every text has ended or `config.max_length` tokens are there.

    `context` needs room for `max_length` more tokens; what is written into it is thrown away, since
    the text is decoded, tokenised again and read as a block of its own. A text depends on its key
    and its context, not on its neighbours.
    """
    batch, longest = keys.shape[0], config.max_length
    assert context.capacity >= longest
    logits = jnp.zeros((batch, longest, model.config.llm.vocab_size)) if want_logits else None
    ids = jnp.zeros((batch, longest), jnp.int32)
    written = Written(ids, jnp.zeros((batch,), jnp.int32), logits)
    context = context._replace(length=jnp.asarray(context.length, jnp.int32))
    start = _State(jnp.int32(0), context, jnp.full((batch,), bos, jnp.int32),
                   jnp.zeros((batch,), bool), written)

    def body(state: _State) -> _State:
        step, written = state.step, state.written
        context, hidden = append_text(model, state.context, state.token[:, None],
                                      jnp.ones((batch,), jnp.int32))
        logits = model.logits(hidden)[:, 0]
        token = _choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), config)
        written = Written(written.ids.at[:, step].set(state.token),
                          written.lengths + ~state.is_done,
                          written.logits.at[:, step].set(logits) if want_logits else None)
        return _State(step + 1, context, token, state.is_done | (token == eos), written)

    is_going = lambda state: (state.step < longest) & ~jnp.all(state.is_done)
    return jax.lax.while_loop(is_going, body, start).written


def _choose(logits: Float[Array, "B W"], keys: Key[Array, "B"], config: TextConfig
            ) -> Int[Array, "B"]:
    if not config.do_sample:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    sample = lambda key, row: jax.random.categorical(key, row / config.temperature)
    return jax.vmap(sample)(keys, logits).astype(jnp.int32)
