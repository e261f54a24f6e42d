"""The parts of a base that are trained by themselves: labels, the vision encoder, resuming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import ImageTransform
from data_pipelines.images import grid_position
from data_pipelines.shapes.labels import KINDS, NOTHING, Labels, label
from data_pipelines.shapes.records import generator
from data_pipelines.shapes.render import render
from data_pipelines.shapes.sample import sample_request, sample_scene
from data_pipelines.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing
from data_pipelines.shapes.split import is_training
from irg_jax.checkpoints import names
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional
from irg_jax.training import encoder
from irg_jax.training.encoder import EncoderConfig, Examiner, make_examples, make_loss, train_encoder
from irg_jax.training.fit import FitConfig, fit

MODEL = ModelConfig(
    LLMConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1),
    ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2),
    VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4), max_latent_size=4,
    vit_max_num_patch_per_side=4)
TRANSFORM = ImageTransform(stride=14, max_size=56, min_size=56)
RECIPE = EncoderConfig(total_steps=60, batch_size=32, num_images=64, learning_rate=3e-3, save_every=20)


def test_labels_of_a_scene_worked_out_by_hand():
    scene = Scene("two_object", (Thing("ring", "blue", "plain", 0.25, 0.25, 0.4),
                                 Thing("heart", "red", "striped", 0.85, 0.6, 0.26)), "pale pink")
    labels = label([scene], side=4)
    ring, heart = SHAPES.index("ring"), SHAPES.index("heart")
    assert labels.background[0] == BACKGROUNDS.index("pale pink")
    assert np.flatnonzero(labels.present[0]).tolist() == sorted(
        [ring * len(COLOURS) + COLOURS.index("blue"), heart * len(COLOURS) + COLOURS.index("red")])
    assert labels.count[0].tolist() == [int(shape in ("ring", "heart")) for shape in SHAPES]
    said = lambda cell: [None if value == NOTHING else words[value]
                         for words, value in zip(KINDS.values(), labels.cells[0, cell])]
    assert [cell for cell in range(16) if labels.cells[0, cell, 0] == ring] == [0, 1, 4, 5]
    assert [cell for cell in range(16) if labels.cells[0, cell, 0] == heart] == [11]
    assert said(0) == ["ring", "blue", "plain", "large", "top left"]
    assert said(11) == ["heart", "red", "striped", "small", "right"]
    assert (labels.cells[0, 2] == NOTHING).all()


def test_every_thing_has_a_cell_and_cells_show_its_colour():
    """Against the pixels: where a cell is empty its middle has the colour of the background."""
    for index in range(60):
        rng = generator(0, "labels", index)
        scene = sample_scene(rng, sample_request(rng, split="train"), split="train")
        labels, image = label([scene], side=4), render(scene, side=64)
        shapes, colours = labels.cells[0, :, 0], labels.cells[0, :, 1]
        assert {(SHAPES[s], COLOURS[c]) for s, c in zip(shapes, colours) if s != NOTHING} == {
            (thing.shape, thing.colour) for thing in scene.things}
        assert labels.count[0].sum() == len(scene.things)
        for cell in np.flatnonzero(shapes == NOTHING):
            row, column = divmod(cell, 4)
            pixel = image[8 + 16 * row, 8 + 16 * column].astype(int)
            assert abs(pixel - image[0, 0]).max() < 12


def test_examples_hold_nothing_that_is_held_out():
    patches, labels = make_examples(dataclasses.replace(RECIPE, num_images=20), TRANSFORM, 14)
    assert patches.shape == (20, 16, 588) and patches.dtype == np.uint8 and labels.cells.shape == (20, 16, 5)
    for index in range(20):
        rng = generator(RECIPE.seed, "encoder", index)
        scene = sample_scene(rng, sample_request(rng, split="train"), split="train")
        assert is_training(scene)
        assert labels.background[index] == BACKGROUNDS.index(scene.background)


@pytest.mark.slow
def test_the_encoder_learns_to_see(tmp_path):
    """On scenes it was not trained on, the heads name most backgrounds; chance is one of eight."""
    config = dataclasses.replace(RECIPE, total_steps=450, num_images=600)
    patches, labels = make_examples(config, TRANSFORM, 14)
    take = lambda rows: (patches[rows], Labels(*(values[rows] for values in labels)))
    examiner = Functional(lambda rngs: Examiner(MODEL, rngs=rngs))
    loss = make_loss(examiner, grid_position(4, 4, 4), width=32, noise=0.1)
    params = fit(loss, lambda: examiner.init(0), lambda index: take(np.arange(32) + 32 * (index % 16)), config,
                 tmp_path / "encoder")
    _, metrics = jax.jit(loss)(params, take(np.arange(512, 600)), jax.random.key(0))
    assert metrics["background"] > 0.8


@pytest.mark.slow
def test_encoder_and_connector_fit_the_network_and_resume_exactly(tmp_path, monkeypatch):
    whole = train_encoder(MODEL, RECIPE, TRANSFORM, tmp_path / "whole")
    shapes = names.model_shapes(MODEL)
    wanted = names.flatten({name: shapes[name] for name in ("vit", "connector")})
    assert {path: value.shape for path, value in names.flatten(whole).items()} == {
        path: leaf.shape for path, leaf in wanted.items()}

    def stopping(seed):
        if seed[1] == 30:
            raise KeyboardInterrupt
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder, "default_rng", stopping)
        train_encoder(MODEL, RECIPE, TRANSFORM, tmp_path / "broken")
    resumed = train_encoder(MODEL, RECIPE, TRANSFORM, tmp_path / "broken")
    for path, value in names.flatten(whole).items():
        np.testing.assert_array_equal(value, names.flatten(resumed)[path], err_msg=path)


def test_a_flipped_bit_is_not_restored(tmp_path, caplog):
    loss = lambda params, batch, key: ((params["w"]**2).sum(), {})
    args = loss, lambda: {"w": jnp.ones(3)}, lambda index: 0, FitConfig(total_steps=2, batch_size=1), tmp_path
    sound = fit(*args)
    files = [path for path in (tmp_path / "checkpoints" / "2" / "ema").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    np.testing.assert_array_equal(fit(*args)["w"], sound["w"])
    assert "checkpoints/2 is not used: ema/" in caplog.text and (tmp_path / "checkpoints" / "2.bad").is_dir()


@pytest.mark.parametrize("field", ["total_steps", "batch_size", "save_every"])
def test_a_recipe_without_steps_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} 0"):
        FitConfig(**{"total_steps": 1, "batch_size": 1, field: 0})
