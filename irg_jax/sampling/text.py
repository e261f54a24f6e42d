"""Writes a text after each of B contexts, all at once, in one compiled loop.

Axes: B contexts, M the longest text, W vocabulary.
Source: `generate_text` of BAGEL's modeling/bagel/bagel.py.
"""

from collections.abc import Sequence
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
    longest: Int[Array, "B"]     # each text's `max_length`
    temperature: Float[Array, "B"]   # 0 takes the likeliest token
    written: Written

    @property
    def is_going(self) -> Bool[Array, "B"]:
        """Which texts have not ended, and may be longer."""
        return ~self.written.is_done & (self.step < self.longest)


def begin_text(settings: Sequence[TextConfig], *, bos: int, room: int, vocab_size: int | None = None
               ) -> Writing:
    """Nothing is written yet.

    Args: settings are those of each text; room is M, whatever they say, so that they share what is compiled;
        logits are kept if `vocab_size` is given.
    """
    shape = (len(settings), room)
    logits = None if vocab_size is None else jnp.zeros((*shape, vocab_size))
    written = Written(jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:1], jnp.int32), jnp.zeros(shape[:1], bool),
                      logits)
    return Writing(jnp.int32(0), jnp.full(shape[:1], bos, jnp.int32),
                   jnp.array([min(one.max_length, room) for one in settings], jnp.int32),
                   jnp.array([one.temperature if one.do_sample else 0 for one in settings], jnp.float32),
                   written)


def write_on(model: IRG, context: Context, writing: Writing, keys: Key[Array, "B"], *, eos: int
             ) -> tuple[Context, Writing]:
    """Decodes until every text has ended or is as long as it may be, or the contexts are full.

    A text depends on its key, settings and context, not on its neighbours, nor on where contexts were full.
    """
    def body(state: tuple[Context, Writing]) -> tuple[Context, Writing]:
        context, writing = state
        (step, token, *_, written), is_going = writing, writing.is_going
        context, hidden = append_text(model, context, token[:, None], jnp.ones_like(token))
        logits = model.logits(hidden)[:, 0]
        following = _choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step), writing.temperature)
        written = Written(written.ids.at[:, step].set(token), written.lengths + is_going,
                          written.is_done | is_going & (following == eos),
                          None if written.logits is None else written.logits.at[:, step].set(logits))
        return context, writing._replace(step=step + 1, token=following, written=written)

    def is_going(state: tuple[Context, Writing]):
        context, writing = state
        return jnp.any(writing.is_going) & (context.view.length < context.view.capacity)
    view = context.view._replace(length=jnp.asarray(context.view.length, jnp.int32))
    return jax.lax.while_loop(is_going, body, (context._replace(view=view), writing))


def _choose(logits: Float[Array, "B W"], keys: Key[Array, "B"], temperature: Float[Array, "B"]
            ) -> Int[Array, "B"]:
    likeliest, is_sampled = jnp.argmax(logits, -1), temperature > 0

    def sample() -> Int[Array, "B"]:
        tempered = logits / jnp.where(is_sampled, temperature, 1)[:, None]
        return jnp.where(is_sampled, jax.vmap(jax.random.categorical)(keys, tempered), likeliest)
    return jax.lax.cond(jnp.any(is_sampled), sample, lambda: likeliest).astype(jnp.int32)
