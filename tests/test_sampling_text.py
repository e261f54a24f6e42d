"""The decoding loop against a plain one that reads the whole text again for every token."""

import jax
import jax.numpy as jnp
import numpy as np

from irg_jax.sampling import cache
from irg_jax.sampling.config import TextConfig
from irg_jax.sampling.text import begin_text, write_on
from sampling_cases import CONFIG, append, bound, distance

BOS, LONGEST = 3, 9
PROMPTS = np.array([[7, 8, 9, 10], [11, 12, 0, 0], [13, 0, 0, 0]], np.int32)
LENGTHS = np.array([4, 2, 1], np.int32)


def contexts(rows=slice(None), capacity: int = 16):
    start = cache.make_empty(CONFIG, len(LENGTHS[rows]), capacity, jnp.float32)
    return append(start, PROMPTS[rows], LENGTHS[rows])[0]


def keys(seeds) -> jax.Array:
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def begin(seeds, *configs: TextConfig, want_logits: bool = False):
    settings = configs if len(configs) == len(seeds) else [*configs] * len(seeds)
    vocab_size = CONFIG.llm.vocab_size if want_logits else None
    return begin_text(settings, bos=BOS, room=LONGEST, vocab_size=vocab_size)


def write(rows, seeds, *configs: TextConfig, eos: int = -1, want_logits: bool = False):
    return go_on(contexts(rows), begin(seeds, *configs, want_logits=want_logits), seeds, eos)[1].written


def go_on(context, writing, seeds, eos: int = -1):
    step = lambda context, writing, keys: write_on(bound(), context, writing, keys, eos=eos)
    return jax.jit(step)(context, writing, keys(seeds))


def plain_greedy(prompt: list[int], length: int) -> tuple[list[int], list[np.ndarray]]:
    ids, logits = [BOS], []
    for _ in range(length):
        read = [*prompt, *ids]
        tokens = np.array([read + [0] * (16 - len(read))], np.int32)
        _, hidden = append(cache.make_empty(CONFIG, 1, 16, jnp.float32), tokens,
                           np.array([len(read)], np.int32))
        logits.append(np.asarray(hidden[0, len(read) - 1] @ bound().lm_head.kernel[...]))
        ids.append(int(logits[-1].argmax()))
    return ids[:-1], logits


def test_greedy_equals_a_plain_loop_and_stops_where_the_text_ends():
    greedy = TextConfig(max_length=LONGEST, do_sample=False)
    expected = [plain_greedy(row[:length].tolist(), LONGEST)
                for row, length in zip(PROMPTS, LENGTHS)]
    written = write([0, 1, 2], [0, 1, 2], greedy, want_logits=True)
    for i, (ids, logits) in enumerate(expected):
        assert np.asarray(written.ids[i]).tolist() == ids and int(written.lengths[i]) == LONGEST
        assert distance(written.logits[i], np.stack(logits)) < 1e-5

    # A token of the first text taken as the end: every text stops before its first occurrence.
    eos = next(token for token in expected[0][0][2:] if token != BOS)
    stopped = write([0, 1, 2], [0, 1, 2], greedy, eos=eos)
    assert stopped.logits is None
    for i, (ids, _) in enumerate(expected):
        length = ids.index(eos) if eos in ids else LONGEST
        assert int(stopped.lengths[i]) == length
        assert np.asarray(stopped.ids[i, :length]).tolist() == ids[:length]
        assert bool(stopped.is_done[i]) == (eos in ids)
    assert int(stopped.lengths[0]) < LONGEST and not written.is_done.any()

    # Its end comes right after the last token that is allowed.
    longest = int(stopped.lengths[0])
    edge = write([0], [0], TextConfig(max_length=longest, do_sample=False), eos=eos)
    assert int(edge.lengths[0]) == longest and bool(edge.is_done[0])


def test_a_text_goes_on_where_its_context_was_full():
    config, seeds = TextConfig(max_length=LONGEST, temperature=1.0), [5, 6, 7]
    expected = write([0, 1, 2], seeds, config)
    context, writing = contexts(capacity=7), begin(seeds, config)
    for capacity, tokens in ((7, 3), (9, 5), (30, LONGEST)):
        context, writing = go_on(cache.enlarge(context, capacity), writing, seeds)
        assert int(writing.step) == tokens and int(context.view.length) == 4 + tokens
    np.testing.assert_array_equal(writing.written.ids, expected.ids)
    np.testing.assert_array_equal(writing.written.lengths, expected.lengths)


def test_sampled_texts_depend_on_their_own_key_alone():
    config = TextConfig(max_length=LONGEST, temperature=1.0)
    ids = lambda rows, seeds: np.asarray(write(rows, seeds, config).ids)
    together = ids([0, 1, 2], [5, 6, 7])
    np.testing.assert_array_equal(ids([2, 0, 1], [7, 5, 9])[:2], together[[2, 0]])
    again = ids([0, 0, 0], [5, 6, 5])
    assert (again[0] == again[2]).all() and (again[0] != again[1]).any()


def test_each_text_has_its_own_temperature_and_length():
    settings = (TextConfig(max_length=LONGEST, temperature=0.5), TextConfig(max_length=3, temperature=2.0),
                TextConfig(max_length=5, do_sample=False))
    together = write([0, 1, 2], [5, 6, 7], *settings)
    for i, one in enumerate(settings):
        alone = write([i], [5 + i], one)
        length = int(together.lengths[i])
        assert length == int(alone.lengths[0]) == one.max_length
        np.testing.assert_array_equal(together.ids[i, :length], alone.ids[0, :length])
    greedy = plain_greedy(PROMPTS[2][:LENGTHS[2]].tolist(), 5)[0]
    assert np.asarray(together.ids[2, :5]).tolist() == greedy

    # What follows after a text's own length is none of its tokens: it did not end by itself.
    eos = int(write([1], [6], TextConfig(max_length=LONGEST, temperature=2.0)).ids[0, 4])
    assert not write([0, 1], [5, 6], *settings[:2], eos=eos).is_done[1]


def test_tokens_are_drawn_from_the_tempered_distribution():
    count, temperature = 4000, 3.0
    written = write([0] * count, range(count), TextConfig(max_length=2, temperature=temperature),
                    want_logits=True)
    logits = np.asarray(written.logits[0, 0], np.float64) / temperature
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    drawn = np.bincount(np.asarray(written.ids[:, 1]), minlength=len(expected)) / count
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (expected > 0.02).sum() > 2, "the test needs a distribution with several likely tokens"
    assert (np.abs(drawn - expected) < 5 * spread + 1 / count).all()
