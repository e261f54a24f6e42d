"""What the page draws: packs read back from their arrays, rasters against the rule itself, histograms."""

import base64
import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_cases import data_config, tokenizer
from data_pipelines.batch import Rows, visible
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.costs import CostTable
from data_pipelines.packing import assemble
from data_pipelines.planning import Entry
from data_pipelines.samples import Kind, Text, VAEImage, ViTImage
from data_pipelines.show_page import drawing, packs, reading
from data_pipelines.show_page.modes import view_tables


def decode(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def make_items(rng: np.random.Generator, kinds: str) -> list:
    """t: text, T: learned text, v: ViT, c: clean VAE, n: noised VAE; images of 1 to 4 tokens."""
    words = lambda: rng.integers(0, 200, rng.integers(1, 6)).tolist()
    image = lambda patch: rng.integers(0, 256, (*(patch * rng.integers(1, 3, 2)), 3), np.uint8)
    make = {"t": lambda: Text(words(), False), "T": lambda: Text(words(), True),
            "v": lambda: ViTImage(image(14)), "c": lambda: VAEImage(image(16), False),
            "n": lambda: VAEImage(image(16), True, 0.5)}
    return [make[kind]() for kind in kinds]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("tTvcn", min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_a_pack_is_read_back(samples, seed):
    """Kinds, contents and loss of every item, from the arrays alone."""
    rng = np.random.default_rng(seed)
    config, words = data_config(text_tokens=400, vit_tokens=200, latent_tokens=200, images=24), tokenizer()
    items = [make_items(rng, kinds) for kinds in samples]
    pack = assemble(items, config=config, tokenizer=words)
    tokens = reading.order_tokens(pack)
    found = reading.read_samples(pack, tokens, config, words)
    kinds = {"t": Kind.TEXT, "T": Kind.TEXT, "v": Kind.VIT, "c": Kind.CLEAN, "n": Kind.NOISED}
    assert [[block.kind for block in blocks] for blocks in found] == [[kinds[kind] for kind in sample]
                                                                      for sample in samples]
    for item, block in zip(sum(items, []), sum(found, [])):
        if isinstance(item, Text):
            assert block.num_tokens == len(item.ids) + 2
            assert block.num_learned == (len(item.ids) + 1) * item.loss and block.text == words.decode(item.ids)
        else:
            np.testing.assert_array_equal(block.picture, item.image)
            assert block.num_learned == (block.num_tokens - 2) * getattr(item, "noised", False)
    assert [block.start for block in sum(found, [])[1:]] == [block.stop for block in sum(found, [])[:-1]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("tTvcn", min_size=1, max_size=6), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_raster_is_the_mean_of_who_sees_whom(samples, seed):
    rng = np.random.default_rng(seed)
    config = data_config(text_tokens=800, vit_tokens=400, latent_tokens=400, images=80)
    pack = assemble([make_items(rng, kinds) for kinds in samples], config=config, tokenizer=tokenizer())
    rows = reading.order_tokens(pack).rows
    count = len(rows.order)
    assert count <= drawing.CELLS * drawing.DETAIL  # so that nothing is left out
    raster, edges = drawing.visibility(rows), drawing.cell_edges(count)
    dense = visible(rows, rows)
    assert raster.shape == (min(count, 160),) * 2
    expected = [[dense[a:b, c:d].mean() for c, d in zip(edges, edges[1:])] for a, b in zip(edges, edges[1:])]
    np.testing.assert_allclose(raster, expected)
    assert (np.diff(edges) > 0).all() and edges[-1] == count


def test_raster_of_a_large_pack_is_close_and_cheap(monkeypatch):
    """Sampled cells lie near the exact means, and the rule is never evaluated on more than 640 tokens."""
    rng = np.random.default_rng(0)
    config = data_config(text_tokens=6000, vit_tokens=400, latent_tokens=400, images=8)
    items = [[Text(rng.integers(0, 200, size).tolist(), True), *make_items(rng, "cvn")]
             for size in (700, 1900, 400)]
    rows = reading.order_tokens(assemble(items, config=config, tokenizer=tokenizer())).rows
    sizes = []

    def counted(query, key):
        sizes.append(len(query.order))
        return visible(query, key)

    monkeypatch.setattr(drawing, "visible", counted)
    raster, edges = drawing.visibility(rows), drawing.cell_edges(len(rows.order))
    dense = visible(rows, rows)
    exact = np.add.reduceat(np.add.reduceat(dense.astype(float), edges[:-1], 0), edges[:-1], 1)
    exact /= np.outer(np.diff(edges), np.diff(edges))
    assert len(rows.order) > 3000 and sizes == [640]
    assert np.abs(raster - exact).mean() < 0.005


def test_raster_shows_what_is_seen():
    """One text token, an image of one noised token, a text token: the image is seen by itself alone."""
    row = lambda *values: np.array(values, np.int32)
    rows = Rows(order=row(0, 1, 2, 3, 4), first=row(0, 0, 0, 0, 0), span=row(0, 1, 1, 1, 4),
                last=row(0, 3, 3, 3, 4), noised=row(0, 1, 1, 1, 0).astype(bool), rope=row(0, 1, 1, 1, 1))
    raster = drawing.visibility(rows)
    np.testing.assert_array_equal(raster, [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0],
                                           [1, 0, 0, 0, 1]])
    colors = np.array([packs.COLORS[kind] for kind in (0, 3, 3, 3, 0)], np.uint8)
    pixels = decode(drawing.embed_raster(raster, colors))
    np.testing.assert_array_equal(pixels[..., 3], 255 * raster)
    np.testing.assert_array_equal(pixels[1, :4, :3], colors[:4])


def block(kind: Kind, tokens: int) -> reading.Block:
    return reading.Block(kind, 0, tokens, 0)


def test_samples_are_matched_with_their_entries():
    plan = lambda *items: [packs.Planned(kind, tokens, keep) for kind, tokens, keep in items]
    text, image = (Kind.TEXT, 5), (Kind.CLEAN, 6)
    entries = [(Entry("a", 0, 0), plan((*text, True), (*image, True))),
               (Entry("a", 0, 1), plan((*text, False))),
               (Entry("b", 0, 2), plan((*text, True), (*image, False))),
               (Entry("c", 0, 3), plan((*image, True)))]
    samples = [[block(*text), block(*image)], [block(*text)], [block(*image)]]
    match = lambda samples: [entry and entry.group for entry, _ in packs.match_entries(samples, entries)]
    assert match(samples) == ["a", "b", "c"]
    assert match(samples[1:]) == ["b", "c"]
    assert match([[block(Kind.TEXT, 4)], *samples[1:]]) == [None, "b", "c"]
    twins = [(Entry("a", 0, index), plan((*text, True))) for index in range(3)]
    assert [entry.index for entry, _ in packs.match_entries([[block(*text)]] * 3, twins)] == [0, 1, 2]


def test_costs_of_a_mode_are_those_of_its_table():
    items = np.array([[0, 5, 0, 0, 0], [1, 2, 9, 0, 0], [0, 7, 0, 0, 0], [3, 2, 0, 4, 1]], np.int32)
    table = CostTable(items, np.array([0, 2, 2, 4]), ("row 1 is bad",))
    config = DataConfig(source="x", groups=(GroupConfig("m", weight=2.0), GroupConfig("n", weight=6.0)))
    first, second = view_tables(config, {"m": table, "n": table})
    assert (first.count, first.num_bad, first.share, second.share) == (3, 1, 0.25, 0.75)
    assert [size.median for size in first.sizes] == [8.0, 4.5, 2.0]
    assert first.named == ("row 1 is bad",)


def test_pictures_are_small_and_true():
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    uri = drawing.embed_picture(image)
    assert uri.startswith("data:image/png")
    np.testing.assert_array_equal(decode(uri), image)
    large = drawing.embed_picture(np.repeat(np.repeat(image, 20, 0), 20, 1))
    assert decode(large).shape == (224, 168, 3)
    assert len(large) < 60_000


def test_histogram_stays_in_its_box():
    drawn = drawing.draw_histogram(np.arange(50), 49.0)
    points = [tuple(map(float, point.split(","))) for point in drawn.split()]
    assert min(y for _, y in points) == 1.0 and all(0 <= x <= 100 and 0 <= y <= 24 for x, y in points)
    assert drawing.draw_histogram(np.zeros(0), 0.0)
