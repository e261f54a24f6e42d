"""Trajectories: whose context holds what, whose randomness is whose, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.batch import INF
from data_pipelines.config import ImageTransform, from_config_dict, load_config
from data_pipelines.shapes.language import SYSTEM_PROMPT
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.trajectory import Generator
from sampling_cases import SETTINGS, distance, make_model

PROMPTS = ["a red circle", "two green stars above one cross and so on", "blue"]
SIZE = {"height": SETTINGS.height, "width": SETTINGS.width}


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(make_model(), SETTINGS)


def length(text: str) -> int:
    return len(make_model().tokenizer.encode(text)) + 2


def used(context) -> list[int]:
    """Tokens that each context holds, gaps not counted."""
    return (np.asarray(context.rows.order) != INF).sum(1).tolist()


def test_contexts_hold_what_the_design_says(generator):
    system, latents, patches = length("plan"), 2 * 3 + 2, 2 * 3 + 2
    prompts = [length(prompt) for prompt in PROMPTS]
    state = generator.begin(PROMPTS, seeds=[0, 1, 2])
    assert used(state.unasked) == [system] * 3
    assert used(state.main) == used(state.unseen) == [system + prompt for prompt in prompts]

    first, second = ["plan two", "plan", "a cross"], ["above", "blue star", "of"]
    _, state = generator.think(state, first)
    first = [length(text) for text in first]
    assert used(state.unasked) == [system] * 3
    image = np.zeros((3, 32, 48, 3), np.uint8)
    state = generator.look(state, image)
    before = [system + prompt + think + latents + patches for prompt, think in zip(prompts, first)]
    _, state = generator.think(state, second)
    second = [length(text) for text in second]
    texts = [system + sum(lengths) for lengths in zip(prompts, first, second)]
    assert used(state.unasked) == before
    assert used(state.main) == [one + think for one, think in zip(before, second)]
    assert used(state.unseen) == texts
    assert np.asarray(state.unseen.next_rope).tolist() == texts  # a left-out image leaves no gap
    assert np.asarray(state.main.next_rope).tolist() == [text + 2 for text in texts]

    # The third turn: two images seen, guided away from all but the newest text.
    state = generator.look(state, image)
    seen = used(state.main)
    _, state = generator.think(state, ["one", "one", "one"])
    assert state.turn == 2 and used(state.unasked) == seen
    assert used(state.unseen) == [text + length("one") for text in texts]


def test_plain_drawing_has_contexts_of_its_own(generator):
    plain = generator.begin(["blue", "red"], seeds=[0, 1], system=False)
    assert used(plain.main) == [length("blue"), length("red")] and used(plain.unasked) == [0, 0]


def test_a_prompt_is_drawn_the_same_whatever_its_neighbours(generator):
    together = generator.trajectories(PROMPTS, seeds=[4, 5, 6])
    others = generator.trajectories([PROMPTS[1], PROMPTS[2], PROMPTS[0]], seeds=[5, 9, 4])
    for mine, again in ((together[1], others[0]), (together[0], others[2])):
        for turn, same in zip(mine, again, strict=True):
            assert turn.text == same.text
            np.testing.assert_array_equal(turn.image, same.image)
    assert (together[2][0].image != others[1][0].image).any(), "another seed draws another image"
    assert (together[0][0].image != together[0][1].image).any(), "each turn has noise of its own"

    alone = generator.trajectories(PROMPTS[:1], seeds=[4])[0]  # another compiled shape
    for turn, same in zip(alone, together[0], strict=True):
        assert turn.text == same.text
        assert np.abs(turn.image.astype(int) - same.image).max() <= 1


def test_self_cot_is_the_trajectory_stopped_early_and_states_are_values(generator):
    (one,), (two,) = (generator.trajectories(PROMPTS[:1], seeds=[4], num_turns=n) for n in (1, 2))
    assert len(one) == 1 and len(two) == 2 and one[0].text == two[0].text
    np.testing.assert_array_equal(one[0].image, two[0].image)
    state = generator.begin(PROMPTS[:1], seeds=[4])
    held = jax.tree.map(np.asarray, state.main)
    (text,), after = generator.think(state)
    assert text == two[0].text
    assert generator.think(state)[0] == [text]
    jax.tree.map(np.testing.assert_array_equal, held, jax.tree.map(np.asarray, state.main))
    np.testing.assert_array_equal(generator.draw(after)[0], one[0].image)


def test_bfloat16_stays_near_float32():
    plain = dataclasses.replace(SETTINGS, turn1=FlowConfig(num_timesteps=3, cfg_text_scale=1.0))
    latents = []
    for dtype in ("float32", "bfloat16"):
        drawer = Generator(make_model(), dataclasses.replace(plain, dtype=dtype))
        state = drawer.begin(PROMPTS[:1], seeds=[0])
        latents.append(drawer.draw_latent(state, **SIZE))
        assert latents[-1].dtype == np.float32  # Euler's small steps would vanish in bfloat16
        assert drawer.draw(state).dtype == np.uint8
    assert 1e-4 < distance(latents[1], latents[0]) < 0.1


def test_a_sampled_posterior_differs_from_its_mean_by_the_seed(generator):
    mean = Generator(make_model(), dataclasses.replace(SETTINGS, posterior="mean"))
    image = np.full((1, 32, 48, 3), 90, np.uint8)
    look = lambda drawer, seed: drawer.look(drawer.begin(["blue"], seeds=[seed]), image)
    cases = ((generator, 0), (generator, 0), (generator, 1), (mean, 0), (mean, 1))
    keys = [np.asarray(look(drawer, seed).main.kv.key) for drawer, seed in cases]
    assert (keys[0] == keys[1]).all() and (keys[3] == keys[4]).all()
    assert (keys[0] != keys[2]).any() and (keys[0] != keys[3]).any()


def test_sizes_that_the_model_cannot_draw_are_refused(generator):
    for height, width in ((40, 48), (32, 16 * 9)):
        with pytest.raises(ValueError, match=f"{height} x {width} .* multiples of 16 up to 128"):
            Generator(make_model(), dataclasses.replace(SETTINGS, height=height, width=width))
    for name, stride in (("vae_transform", 8), ("vit_transform", 16)):
        transform = {name: ImageTransform(stride, 64, 16)}
        with pytest.raises(ValueError, match=f"{name}.stride is {stride}"):
            Generator(make_model(), dataclasses.replace(SETTINGS, **transform))


def test_settings_are_checked_at_the_door():
    for cls, fields in ((FlowConfig, {"num_timesteps": 1}), (FlowConfig, {"timestep_shift": 0.0}),
                        (FlowConfig, {"cfg_renorm_min": 2.0}), (TextConfig, {"max_length": 0}),
                        (TextConfig, {"temperature": 0.0}), (SamplingConfig, {"num_turns": 0})):
        with pytest.raises(ValueError, match=next(iter(fields))):
            cls(**fields)
    with pytest.raises(ValueError, match="turn1.cfg_txt_scale.*cfg_text_scale"):
        from_config_dict(SamplingConfig, {"turn1": {"cfg_txt_scale": 2.0}})


@pytest.mark.parametrize("size", ["full", "quick"])
def test_the_miniature_config_is_sound(size):
    config = from_config_dict(SamplingConfig, load_config(f"configs/shapes_generate.py:{size}"))
    assert config.system_prompt == SYSTEM_PROMPT
    assert config.flow(0).cfg_renorm_type == "global"
    assert config.flow(1) == config.flow(2) == config.turn2
    default = SamplingConfig()
    assert (default.turn1.cfg_interval, default.turn2.cfg_interval) == ((0.4, 1.0), (0.0, 1.0))
