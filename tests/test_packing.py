"""Packs hold exactly what the original would pack, and what was planned for them."""

import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cases import FakeTokenizer, Golden, data_config, encode_image, golden_folder
from data_pipelines.batch import INF, Rows, visible
from data_pipelines.config import GroupConfig
from data_pipelines.costs import CostTable
from data_pipelines.packing import assemble, empty_pack
from data_pipelines.planning import Planner
from data_pipelines.records import ImagePart, Record, TextPart
from data_pipelines.samples import Gap, Text, VAEImage, ViTImage, measure, realise
from test_batch import dense_mask

# ---- assemble ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden(request):
    return Golden(golden_folder(request))


@pytest.fixture(scope="module")
def golden_pack(golden):
    config = golden.data_config(**golden.room())
    tokenizer = FakeTokenizer(golden.values["special_tokens"])
    return assemble(golden.train_samples(), config=config, tokenizer=tokenizer)


def joined(pack) -> Rows:
    """The rows of all three streams, padding left out, in order of time."""
    streams = zip(pack.text_rows, pack.vit_rows, pack.latent_rows)
    rows = Rows(*(np.concatenate(stream) for stream in streams))
    order = np.argsort(rows.order, kind="stable")[:np.count_nonzero(rows.order != INF)]
    return Rows(*(row[order] for row in rows))


def test_golden_pack_places_every_token(golden, golden_pack):
    arrays, pack = golden.arrays, golden_pack
    for rows, name in ((pack.text_rows, "text"), (pack.vit_rows, "vit"), (pack.latent_rows, "vae")):
        used = rows.order[rows.order != INF]
        np.testing.assert_array_equal(used, arrays[f"train.{name}_indexes"])
        assert (rows.order[len(used):] == INF).all()
    np.testing.assert_array_equal(joined(pack).rope, arrays["train.position_ids"])
    np.testing.assert_array_equal(pack.text_ids[:len(arrays["train.text_ids"])],
                                  arrays["train.text_ids"])


def test_golden_pack_learns_the_same_tokens(golden, golden_pack):
    arrays, pack = golden.arrays, golden_pack
    learned = pack.text_weight > 0
    np.testing.assert_array_equal(pack.text_rows.order[learned], arrays["train.ce_indexes"])
    np.testing.assert_array_equal(pack.text_target[learned], arrays["train.labels"])
    assert set(pack.text_weight[learned]) == {1.0}
    np.testing.assert_array_equal(pack.latent_rows.order[pack.latent_weight > 0],
                                  arrays["train.mse_indexes"])


def test_golden_reweighting(golden):
    config = golden.data_config(**golden.room(), ce_reweight=True)
    pack = assemble(golden.train_samples(), config=config,
                    tokenizer=FakeTokenizer(golden.values["special_tokens"]))
    np.testing.assert_allclose(pack.text_weight[pack.text_weight > 0],
                               golden.arrays["train.ce_weights"], rtol=1e-6)


def test_golden_pack_is_seen_as_the_original_sees_it(golden, golden_pack):
    rows = joined(golden_pack)
    expected = np.zeros((len(rows.order),) * 2, bool)
    start = 0
    for sample in golden.values["train_samples"]:
        block = dense_mask(sample["split_lens"], sample["attn_modes"])
        expected[start:start + len(block), start:start + len(block)] = block
        start += len(block)
    assert start == len(rows.order)
    np.testing.assert_array_equal(visible(rows, rows), expected)


def test_golden_pack_images(golden, golden_pack):
    """Pixels, positions and the image table, against a walk over the images themselves."""
    pack, start, slot, vit_start = golden_pack, 0, 0, 0
    side, vit_side = golden.config["max_latent_size"], golden.config["vit_max_num_patch_per_side"]
    patch, vit_patch = golden.data_config().latent_patch, golden.data_config().vit_patch
    for item in (item for sample in golden.train_samples() for item in sample):
        if isinstance(item, Text):
            continue
        is_vit = isinstance(item, ViTImage)
        size = vit_patch if is_vit else patch
        height, width = item.image.shape[0] // size, item.image.shape[1] // size
        for row in range(height):
            for column in range(width):
                pixels = item.image[row * size:(row + 1) * size, column * size:(column + 1) * size]
                if is_vit:
                    token = vit_start + row * width + column
                    np.testing.assert_array_equal(pack.vit_patches[token], pixels.ravel())
                    assert pack.vit_position[token] == row * vit_side + column
                else:
                    token = start + row * width + column
                    np.testing.assert_array_equal(pack.latent_pixels[token], pixels.ravel())
                    assert pack.latent_position[token] == row * side + column
                    assert pack.latent_image[token] == slot
        if is_vit:
            vit_start += height * width
            continue
        assert (pack.image_start[slot], pack.image_height[slot], pack.image_width[slot]) == (
            start, height, width)
        assert pack.image_timestep[slot] == np.float32(item.timestep)
        start, slot = start + height * width, slot + 1
    assert (pack.image_height[slot:] == 0).all()
    assert (pack.latent_image[start:] == len(pack.image_start)).all()


def test_gaps_and_noised_images_in_rope():
    image = np.zeros((32, 32, 3), np.uint8)
    vit = np.zeros((28, 28, 3), np.uint8)
    config = data_config()
    rope_of_last_text = {}
    for name, items in {"none": [], "gap": [Gap()], "gaps": [Gap(), Gap()],
                        "clean": [VAEImage(image, False)], "vit": [ViTImage(vit)],
                        "noised": [VAEImage(image, True, 0.5)]}.items():
        pack = assemble([[Text([5, 6], False), *items, Text([7], True)]], config=config,
                        tokenizer=FakeTokenizer())
        rope_of_last_text[name] = joined(pack).rope[-3:].tolist()
    assert rope_of_last_text == {"none": [4, 5, 6], "gap": [5, 6, 7], "gaps": [6, 7, 8],
                                 "clean": [5, 6, 7], "vit": [5, 6, 7], "noised": [4, 5, 6]}


def test_empty_pack_has_the_shapes_of_a_full_one(golden_pack, golden):
    config = golden.data_config(**golden.room())
    describe = lambda pack: [(array.shape, array.dtype) for field in pack
                             for array in (field if isinstance(field, Rows) else (field,))]
    assert describe(empty_pack(config)) == describe(golden_pack)


# ---- random plans -----------------------------------------------------------------------------

class Token(NamedTuple):
    """What is to be known of a token, told one token after the other, as the original packs."""

    stream: str
    value: object     # its id, or its pixels as bytes
    target: int       # 0: none
    weight: float
    order: int
    first: int
    span: int
    last: int
    noised: bool
    rope: int


def expected_tokens(samples, tokenizer, config) -> list[Token]:
    """Every token of a pack in order of time, from the rules of docs/design.md."""
    tokens = []
    for sample in samples:
        first, rope = len(tokens), 0
        for item in sample:
            start = len(tokens)
            if isinstance(item, Gap):
                rope += 1
            elif isinstance(item, Text):
                ids = [tokenizer.bos, *item.ids, tokenizer.eos]
                weight = 1 / math.sqrt(len(ids) - 1) if config.ce_reweight else 1.0
                for i, value in enumerate(ids):
                    learned = item.loss and i + 1 < len(ids)
                    tokens.append(Token("text", value, ids[i + 1] if learned else 0, weight if learned else 0.0,
                                        start + i, first, start + i, start + i, False, rope + i))
                rope += len(ids)
            else:
                is_vit = isinstance(item, ViTImage)
                size = config.vit_patch if is_vit else config.latent_patch
                noised = not is_vit and item.noised
                height, width = item.image.shape[0] // size, item.image.shape[1] // size
                last = start + height * width + 1
                block = (first, start, last, noised, rope)
                tokens.append(Token("text", tokenizer.start_of_image, 0, 0.0, start, *block))
                for y in range(height):
                    for x in range(width):
                        pixels = item.image[y * size:(y + 1) * size, x * size:(x + 1) * size].tobytes()
                        tokens.append(Token("vit" if is_vit else "latent", pixels, 0, float(noised),
                                            len(tokens), *block))
                tokens.append(Token("text", tokenizer.end_of_image, 0, 0.0, last, *block))
                rope += not noised
    return tokens


def tokens_of(pack) -> list[Token]:
    """What a pack's streams hold, padding left out, in order of time."""
    none = itertools.repeat(0)
    streams = (("text", pack.text_ids.tolist(), pack.text_target, pack.text_weight, pack.text_rows),
               ("vit", [patch.tobytes() for patch in pack.vit_patches], none, none, pack.vit_rows),
               ("latent", [pixels.tobytes() for pixels in pack.latent_pixels], none, pack.latent_weight,
                pack.latent_rows))
    tokens = [Token(name, value, int(target), float(weight), *map(int, rows))
              for name, values, targets, weights, rows in streams
              for value, target, weight, *rows in zip(values, targets, weights, *rows) if rows[0] != INF]
    return sorted(tokens, key=lambda token: token.order)


def random_record(rng: random.Random) -> Record:
    """Texts and images of any flags; the pixels of no two patches are alike."""
    parts = []
    for place in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            parts.append(TextPart("x" * rng.randint(1, 9) + chr(97 + place), rng.random() < 0.5, str(place)))
        else:
            side = rng.choice((16, 28, 32, 40))
            pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (side, 32, 3), np.uint8)
            flags = rng.choice([(True, False, False), (False, True, True), (True, True, True),
                                (False, False, True)])
            parts.append(ImagePart(encode_image(pixels), *flags, str(place)))
    return Record(tuple(parts), "full", "record")


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), dropout=st.sampled_from((0.0, 0.4, 1.0)), reweight=st.booleans(),
       mandatory=st.booleans())
def test_every_token_of_a_planned_pack_is_there_once_as_the_rules_say(seed, dropout, reweight, mandatory):
    rng, tokenizer = random.Random(seed), FakeTokenizer()
    config = data_config(seed=seed, ce_reweight=reweight, text_dropout=dropout / 2, vit_dropout=dropout,
                         vae_dropout=dropout, vit_tokens=64, latent_tokens=96, images=16,
                         groups=(GroupConfig("a", 1.0, mandatory), GroupConfig("b", 0.5)))
    groups = {group.name: group for group in config.groups}
    records = {name: [random_record(rng) for _ in range(5)] for name in groups}
    measured = {name: [measure(record, config, tokenizer, group=groups[name]) for record in records[name]]
                for name in groups}
    planner = Planner(config, {name: CostTable(np.concatenate(items), np.cumsum([0, *map(len, items)]))
                               for name, items in measured.items()})
    for index in range(3):
        plan = planner[index]
        samples = [realise(records[entry.group][entry.index], planner.draws(entry), config, tokenizer,
                           group=groups[entry.group]) for entry in plan.entries]
        pack = assemble(samples, config=config, tokenizer=tokenizer)
        expected = expected_tokens(samples, tokenizer, config)
        assert [token._replace(weight=0) for token in tokens_of(pack)] == [
            token._replace(weight=0) for token in expected]
        np.testing.assert_allclose([token.weight for token in tokens_of(pack)],
                                   [token.weight for token in expected], rtol=1e-6)
        for count, stream in zip(plan.cost, ("text", "vit", "latent")):
            assert count == sum(token.stream == stream for token in expected)
        assert plan.cost.images == np.count_nonzero(pack.image_height) <= config.images
        timesteps = [item.timestep for sample in samples for item in sample if isinstance(item, VAEImage)]
        np.testing.assert_array_equal(pack.image_timestep[:len(timesteps)], np.array(timesteps, np.float32))
        assert_sees_its_own_sample_alone(pack, samples, config)


def assert_sees_its_own_sample_alone(pack, samples, config) -> None:
    """Visibility is the block diagonal of each sample's own dense mask, and padding sees nothing."""
    rows = joined(pack)
    expected, start = np.zeros((len(rows.order),) * 2, bool), 0
    for sample in samples:
        lens, modes = [], []
        for item in sample:
            if isinstance(item, Text):
                lens, modes = [*lens, len(item.ids) + 2], [*modes, "causal"]
            elif not isinstance(item, Gap):
                size = config.vit_patch if isinstance(item, ViTImage) else config.latent_patch
                tokens = item.image.shape[0] // size * (item.image.shape[1] // size)
                noised = isinstance(item, VAEImage) and item.noised
                lens, modes = [*lens, tokens + 2], [*modes, "noise" if noised else "full"]
        block = dense_mask(lens, modes)
        expected[start:start + len(block), start:start + len(block)] = block
        start += len(block)
    assert start == len(rows.order)
    np.testing.assert_array_equal(visible(rows, rows), expected)
    everything = Rows(*(np.concatenate(row) for row in zip(pack.text_rows, pack.vit_rows, pack.latent_rows)))
    padding = everything.order == INF
    seen = visible(everything, everything)
    assert not seen[padding].any() and not seen[:, padding].any()
