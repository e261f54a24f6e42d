"""Plans keep budgets, epochs and the mixture; packs hold exactly what the original would pack."""

import collections
import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cases import FakeTokenizer, Golden, data_config, golden_folder
from data_pipelines.batch import INF, Rows, visible
from data_pipelines.config import GroupConfig
from data_pipelines.costs import CostTable, budget
from data_pipelines.packing import assemble, empty_pack
from data_pipelines.planning import CHUNK, Planner
from data_pipelines.samples import Gap, Kind, Text, VAEImage, ViTImage
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


# ---- plan -------------------------------------------------------------------------------------

def cost_table(records) -> CostTable:
    """records: lists of (kind, text, vit, latent, images)."""
    items = [np.array(record, np.int32).reshape(-1, 5) for record in records]
    return CostTable(np.concatenate(items), np.cumsum([0, *map(len, items)]))


def random_tables(seed: int, names) -> dict[str, CostTable]:
    rng = random.Random(seed)
    def record():
        rows = [(Kind.TEXT, rng.randint(3, 40), 0, 0, 0)]
        for _ in range(rng.randint(0, 2)):
            kind = rng.choice((Kind.VIT, Kind.CLEAN, Kind.NOISED))
            size = rng.choice((4, 9, 16))
            rows.append((kind, 2, size if kind == Kind.VIT else 0,
                         0 if kind == Kind.VIT else size, int(kind != Kind.VIT)))
        return rows
    return {name: cost_table([record() for _ in range(rng.randint(1, 12))]) for name in names}


GROUPS = st.lists(st.tuples(st.sampled_from((0.25, 0.5, 1.0, 3.0)), st.booleans()),
                  min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), groups=GROUPS, lookahead=st.integers(1, 12),
       slack=st.integers(0, 5), dropout=st.sampled_from((0.0, 0.3, 1.0)))
def test_plan_keeps_budgets_and_epochs(seed, groups, lookahead, slack, dropout):
    config = data_config(
        seed=seed, lookahead=lookahead, mixture_slack=slack, vae_dropout=dropout, patience=3,
        text_tokens=400, vit_tokens=160, latent_tokens=160, images=12,
        groups=tuple(GroupConfig(f"group{i}", weight, mandatory)
                     for i, (weight, mandatory) in enumerate(groups)))
    tables = random_tables(seed, [group.name for group in config.groups])
    planner = Planner(config, tables)
    seen = collections.defaultdict(list)
    for i in range(CHUNK + 4):
        pack = planner[i]
        total = np.zeros(4, int)
        for entry in pack.entries:
            items = tables[entry.group].record(entry.index)
            draws = planner.draws(entry)
            total += items[draws.chosen[draws.keep], 1:].sum(axis=0)
            seen[entry.group, entry.epoch].append(entry.index)
        assert tuple(total) == pack.cost
        assert (total <= budget(config)).all()
        assert {group.name for group in config.groups if group.is_mandatory} <= {
            entry.group for entry in pack.entries}
    for group in config.groups:
        epochs = [epoch for name, epoch in seen if name == group.name]
        for epoch in range(max(epochs) + 1):
            indices = seen[group.name, epoch]
            assert len(set(indices)) == len(indices)  # never twice in an epoch
            if epoch < max(epochs) - 1:               # a window spans two epochs at most
                assert sorted(indices) == list(range(len(tables[group.name])))


def test_plan_is_the_same_from_anywhere():
    config = data_config(groups=(GroupConfig("a", 1.0, True), GroupConfig("b", 0.5)), seed=3)
    tables = random_tables(5, ("a", "b"))
    forward = Planner(config, tables)
    straight = [forward[i] for i in range(3 * CHUNK)]
    for start in (2 * CHUNK + 7, CHUNK - 1, 0, 3 * CHUNK - 1, 5):
        assert Planner(config, tables)[start] == straight[start]
        assert forward[start] == straight[start]  # also backwards, over kept states
    other = Planner(dataclasses.replace(config, seed=4), tables)
    assert [other[i] for i in range(8)] != straight[:8]


def test_mixture_follows_the_weights():
    """Text-only records must not flood the space that images leave in the text stream."""
    config = data_config(groups=(GroupConfig("small", 0.5), GroupConfig("large", 1.0)),
                         mixture_slack=3)
    tables = {"small": cost_table([[(Kind.TEXT, 5, 0, 0, 0)]] * 20),
              "large": cost_table([[(Kind.TEXT, 5, 0, 0, 0), (Kind.NOISED, 2, 0, 16, 1)]] * 20)}
    planner = Planner(config, tables)
    counts = collections.Counter()
    for i in range(200):
        counts.update(entry.group for entry in planner[i].entries)
        assert abs(counts["small"] - counts["large"] / 2) <= 4


def test_a_large_record_is_not_passed_over_for_ever():
    config = data_config(groups=(GroupConfig("a", 1.0, True), GroupConfig("b", 1.0)), patience=4)
    tables = {"a": cost_table([[(Kind.TEXT, 100, 0, 0, 0)]] * 4),
              "b": cost_table([[(Kind.TEXT, 10, 0, 0, 0)]] * 9 + [[(Kind.TEXT, 150, 0, 0, 0)]])}
    planner = Planner(config, tables)
    times = [i for i in range(300) if any(entry.group == "b" and entry.index == 9
                                          for entry in planner[i].entries)]
    epochs = max(entry.epoch for i in range(300) for entry in planner[i].entries
                 if entry.group == "b")
    assert len(times) >= epochs - 1 > 3


def test_lookahead_fills_better_than_taking_in_turn():
    rng = np.random.default_rng(0)
    records = [[(Kind.TEXT, int(size), 0, 0, 0)] for size in rng.integers(5, 90, 400)]
    tables = {"full": cost_table(records)}
    def fill(lookahead):
        planner = Planner(data_config(lookahead=lookahead), tables)
        return np.mean([planner[i].cost.text / 160 for i in range(200)])
    assert fill(1) < 0.85 and fill(32) > 0.97


def test_mandatory_groups_that_never_fit_together_are_refused():
    config = data_config(groups=(GroupConfig("a", 1.0, True), GroupConfig("b", 1.0, True)))
    tables = {name: cost_table([[(Kind.TEXT, 100, 0, 0, 0)]]) for name in ("a", "b")}
    with pytest.raises(ValueError, match="mandatory groups.*text=200.*text=160"):
        Planner(config, tables)
