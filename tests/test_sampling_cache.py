"""Contexts read block by block against the training forward, which sees everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_cases import data_config
from data_pipelines.batch import INF
from data_pipelines.packing import assemble
from data_pipelines.samples import Text, VAEImage, ViTImage
from irg_jax.models.irg import normalize_pixels
from irg_jax.models.streams import Streams
from irg_jax.sampling import cache
from sampling_cases import CONFIG, append, bound, distance, make_model, predict

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (32, 48, 3), np.uint8)
SEEN = RNG.integers(0, 256, (28, 42, 3), np.uint8)
FIRST, SECOND = [5, 6, 7], [8, 9, 10, 11, 12]
LATENT = RNG.standard_normal((2, 6, CONFIG.latent_channels)).astype(np.float32)  # clean, noised
TIME = np.float32(0.3)


@pytest.fixture(scope="module")
def model():
    return bound()


def brackets() -> jnp.ndarray:
    tokenizer = make_model().tokenizer
    return jnp.array([tokenizer.start_of_image, tokenizer.end_of_image], jnp.int32)


def framed(*texts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Texts between their brackets, padded to eight tokens."""
    tokenizer = make_model().tokenizer
    rows = [[tokenizer.bos, *ids, tokenizer.eos] for ids in texts]
    tokens = np.full((len(rows), 8), 99, np.int32)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = ids
    return tokens, np.array([len(row) for row in rows], np.int32)


@pytest.fixture(scope="module")
def packed(model):
    """Hidden text states and the velocity of text, clean image, ViT image, text, noised image."""
    config = data_config(text_tokens=32, vit_tokens=8, latent_tokens=16, images=2, latent_patch=16,
                         vit_patch=14, max_latent_size=8, vit_max_side=8)
    pack = assemble([[Text(FIRST, False), VAEImage(PICTURE, False), ViTImage(SEEN),
                      Text(SECOND, True), VAEImage(PICTURE, True, 0.0)]],
                    config=config, tokenizer=make_model().tokenizer)
    pack = jax.tree.map(lambda x: jnp.asarray(x)[None], pack)
    latent = np.zeros((1, 16, CONFIG.latent_channels), np.float32)
    latent[0, :12] = LATENT.reshape(12, -1)
    time = np.zeros((1, 16), np.float32)
    time[0, 6:12] = TIME

    @jax.jit
    def forward(latent, time):
        embedded = Streams(
            model.embed_text(pack.text_ids, jnp.float32),
            model.embed_vit(normalize_pixels(pack.vit_patches, jnp.float32), pack.vit_position,
                            pack.vit_rows),
            model.embed_latent(latent, time, pack.latent_position))
        hidden, _ = model(embedded, Streams(pack.text_rows, pack.vit_rows, pack.latent_rows))
        return hidden.text[0], model.velocity(hidden.latent)[0]
    text, velocity = forward(latent, time)
    second = len(FIRST) + 2 + 2 + 2
    return text[second:second + len(SECOND) + 2], velocity[6:12], pack


def read_all(model, start, pack):
    """The same by blocks: (context, hidden states of the second text)."""
    latent_position, vit_position = pack.latent_position[0, :6], pack.vit_position[0, :6]
    batch = start.view.next_order.shape[0]
    many = lambda x: jnp.repeat(jnp.asarray(x)[None], batch, axis=0)
    context, _ = append(start, *framed(*[FIRST] * batch))
    images = jax.jit(lambda context, latent, patches: cache.append_vit(
        model, cache.append_latent(model, context, brackets(), latent, latent_position),
        brackets(), patches, vit_position))
    context = images(context, many(LATENT[0]), many(pack.vit_patches[0, :6]))
    return append(context, *framed(*[SECOND] * batch))


def test_blocks_equal_the_packed_forward(model, packed):
    text, velocity, pack = packed
    context, hidden = read_all(model, cache.make_empty(CONFIG, 1, 64, jnp.float32), pack)
    noised = predict(context, brackets(), LATENT[1:], TIME, pack.latent_position[0, 6:12])
    assert distance(hidden[0, :len(SECOND) + 2], text) < 1e-5
    assert distance(noised[0], velocity) < 1e-5
    # One id a text token, one an image; the noised image takes the next without using it up.
    assert int(context.view.next_rope[0]) == len(FIRST) + 2 + 1 + 1 + len(SECOND) + 2
    assert int(pack.latent_rows.rope[0, 6]) == int(context.view.next_rope[0])


def test_what_lies_in_gaps_and_beyond_the_end_is_never_seen(model, packed):
    _, _, pack = packed
    context, _ = read_all(model, cache.make_empty(CONFIG, 1, 64, jnp.float32), pack)
    empty = np.asarray(context.view.rows.order[0]) == INF
    assert empty.sum() == 64 - (len(FIRST) + 2 + 8 + 8 + len(SECOND) + 2)
    dirty = context._replace(kv=jax.tree.map(lambda x: x.at[:, :, :, empty].set(1e4), context.kv))
    ask = lambda start: predict(start, brackets(), LATENT[1:], TIME,
                                  pack.latent_position[0, 6:12])
    np.testing.assert_array_equal(ask(context), ask(dirty))
    enlarged = cache.enlarge(context, 96)
    assert enlarged.view.capacity == enlarged.kv.key.shape[3] == 96
    assert distance(ask(enlarged), ask(context)) < 1e-6


def test_ragged_texts_are_read_as_if_alone():
    texts = [FIRST, [], SECOND]
    together = cache.make_empty(CONFIG, 3, 32, jnp.float32)
    for _ in range(2):  # the second text comes after gaps of different width
        together, hidden = append(together, *framed(*texts))
    for i, ids in enumerate(texts):
        alone = cache.make_empty(CONFIG, 1, 32, jnp.float32)
        for _ in range(2):
            alone, expected = append(alone, *framed(ids))
        size = len(ids) + 2
        assert distance(hidden[i, :size], expected[0, :size]) < 1e-5
        assert int(together.view.next_rope[i]) == int(alone.view.next_rope[0]) == 2 * size


def test_repeated_contexts_are_the_one_they_came_from(packed):
    _, _, pack = packed
    position = pack.latent_position[0, 6:12]
    one, _ = append(cache.make_empty(CONFIG, 1, 32, jnp.float32), *framed(FIRST))
    noisy = jnp.asarray(RNG.standard_normal((2, 6, CONFIG.latent_channels)), jnp.float32)
    ask = lambda start, latent: predict(start, brackets(), latent, TIME, position)
    expected = jnp.concatenate([ask(one, each[None]) for each in noisy])
    assert distance(ask(cache.repeat(one, 2), noisy), expected) < 1e-5


def test_views_of_a_context_and_another_in_one_pass_are_each_by_itself(model, packed):
    """An earlier view stays what it was while its context grows."""
    _, _, pack = packed
    position = pack.latent_position[0, 6:12]
    empty = cache.make_empty(CONFIG, 1, 16, jnp.float32)
    early, _ = append(empty, *framed(FIRST))
    alone = [predict(each, brackets(), LATENT[1:], TIME, position) for each in (empty, early)]
    late, _ = append(cache.enlarge(early, 32), *framed(SECOND))
    other, _ = append(cache.make_empty(CONFIG, 1, 16, jnp.float32), *framed(SECOND))
    alone += [predict(each, brackets(), LATENT[1:], TIME, position) for each in (late, other)]
    seen = [(late.kv, [empty.view, early.view, late.view]), (other.kv, [other.view])]
    together = jax.jit(lambda latent: cache.predict_velocities(model, seen, brackets(), latent, TIME, position)
                       )(LATENT[1:])
    assert distance(alone[0], alone[1]) > 1e-3 and distance(alone[1], alone[2]) > 1e-3
    for velocity, expected in zip(together, alone, strict=True):
        assert distance(velocity, expected) < 1e-5
    again = cache.fork(late, early.view)
    assert again.view.capacity == 16
    assert distance(predict(again, brackets(), LATENT[1:], TIME, position), alone[1]) < 1e-6
