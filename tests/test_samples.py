"""From record to items: order, costs without pixels, dropout and timesteps."""


import numpy as np
import pytest

from data_cases import FakeTokenizer, data_config, encode_image
from data_pipelines.config import GroupConfig, ImageTransform
from data_pipelines.packing import assemble
from data_pipelines.records import ImagePart, Record, TextPart
from data_pipelines.samples import Gap, Kind, Text, VAEImage, ViTImage, draw, measure, realise, unfold

FULL = GroupConfig("full")
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)


def record(*parts) -> Record:
    return Record(tuple(part._replace(place=f"file row 0, part {i}")
                        for i, part in enumerate(parts)), "full", "file row 0")


def image(loss=False, vae=False, vit=False, data=encode_image(PICTURE)) -> ImagePart:
    return ImagePart(data, loss, vae, vit, "")


IMPROVING = record(TextPart("prompt", False, ""), image(vae=True, vit=True),
                   TextPart("better", True, ""), image(loss=True, vae=True, vit=True))


def kinds_of(a_record) -> np.ndarray:
    return np.array([kind for kind, _ in unfold(a_record)])


def test_items_in_the_originals_order():
    assert kinds_of(IMPROVING).tolist() == [
        Kind.TEXT, Kind.CLEAN, Kind.VIT, Kind.TEXT, Kind.NOISED, Kind.CLEAN, Kind.VIT]
    assert kinds_of(record(image())).tolist() == []


def test_costs_are_what_the_sample_takes():
    """Measured from headers, compared with the streams that the assembled pack fills."""
    config = data_config(vae_transform=ImageTransform(16, 48, 32),
                         vit_transform=ImageTransform(14, 56, 28))
    tokenizer = FakeTokenizer()
    rows = measure(IMPROVING, config, tokenizer, group=FULL)
    assert rows[0].tolist() == [Kind.TEXT, len("prompt") + 2, 0, 0, 0]
    assert rows[1].tolist() == [Kind.CLEAN, 2, 0, 6, 1]  # 40 x 24 -> 48 x 32
    draws = draw(rows[:, 0], config, group=FULL, epoch=0, index=0)
    pack = assemble([realise(IMPROVING, draws, config, tokenizer, group=FULL)], config=config,
                    tokenizer=tokenizer)
    used = [np.count_nonzero(stream.last >= 0)
            for stream in (pack.text_rows, pack.vit_rows, pack.latent_rows)]
    assert rows[:, 1:].sum(axis=0).tolist() == [*used, np.count_nonzero(pack.image_height)]


def test_measuring_decodes_no_pixels():
    whole = encode_image(PICTURE)
    cut = record(image(loss=True, data=whole[:len(whole) // 2]))
    assert measure(cut, data_config(), FakeTokenizer(), group=FULL)[0, 3] > 0
    with pytest.raises(ValueError, match="file row 0, part 0: the image does not decode"):
        draws = draw(kinds_of(cut), data_config(), group=FULL, epoch=0, index=0)
        realise(cut, draws, data_config(), FakeTokenizer(), group=FULL)


def test_images_that_outgrow_their_table_are_named():
    config = data_config(max_latent_size=2)
    with pytest.raises(ValueError, match="part 0: at 32 x 48 .* 2 x 2 position table"):
        measure(record(image(loss=True, data=encode_image(PICTURE[:36, :20]))),
                data_config(max_latent_size=2, vae_transform=ImageTransform(16, 64, 28)),
                FakeTokenizer(), group=FULL)
    assert measure(record(image(vit=True)), config, FakeTokenizer(), group=FULL).shape == (1, 5)


def test_dropout_leaves_gaps_for_images_and_nothing_for_text():
    config = data_config(text_dropout=1.0, vit_dropout=1.0, vae_dropout=1.0)
    draws = draw(kinds_of(IMPROVING), config, group=FULL, epoch=0, index=0)
    items = realise(IMPROVING, draws, config, FakeTokenizer(), group=FULL)
    assert [type(item) for item in items] == [Gap, Gap, VAEImage, Gap, Gap]
    assert items[2].noised and np.isfinite(items[2].timestep)


def test_what_is_kept_is_whole():
    config = data_config()
    draws = draw(kinds_of(IMPROVING), config, group=FULL, epoch=0, index=0)
    items = realise(IMPROVING, draws, config, FakeTokenizer(), group=FULL)
    assert [type(item) for item in items] == [
        Text, VAEImage, ViTImage, Text, VAEImage, VAEImage, ViTImage]
    assert [item.loss for item in items if isinstance(item, Text)] == [False, True]
    assert [item.timestep for item in items if isinstance(item, VAEImage) and not item.noised] == [
        -np.inf, -np.inf]
    np.testing.assert_array_equal(items[1].image, items[5].image)


def test_draws_follow_their_probabilities():
    config = data_config(text_dropout=0.1, vit_dropout=0.5, vae_dropout=0.3)
    kinds = np.repeat([Kind.TEXT, Kind.VIT, Kind.CLEAN, Kind.NOISED], 5)
    draws = [draw(kinds, config, group=FULL, epoch=epoch, index=index)
             for epoch in range(20) for index in range(50)]
    keep = np.mean([each.keep for each in draws], axis=0).reshape(4, 5).mean(axis=1)
    np.testing.assert_allclose(keep, [0.9, 0.5, 0.7, 1.0], atol=0.03)
    timesteps = np.concatenate([each.timestep for each in draws])
    assert abs(timesteps.mean()) < 0.03 and abs(timesteps.std() - 1) < 0.03


def test_draws_depend_on_every_argument_and_nothing_else():
    kinds = np.full(8, Kind.CLEAN)
    base = dict(group=FULL, epoch=1, index=2)
    reference = draw(kinds, data_config(vae_dropout=0.5), **base).timestep
    np.testing.assert_array_equal(draw(kinds, data_config(vae_dropout=0.1), **base).timestep,
                                  reference)
    for changed in (dict(group=GroupConfig("other")), dict(epoch=2), dict(index=1)):
        assert (draw(kinds, data_config(), **(base | changed)).timestep != reference).all()
    assert (draw(kinds, data_config(seed=1), **base).timestep != reference).all()
