"""Trajectories: whose context holds what, whose randomness is whose, and what is refused."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from data_pipelines.batch import INF
from data_pipelines.config import ImageTransform, from_config_dict, load_config
from data_pipelines.shapes.language import SYSTEM_PROMPT
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.sampling.cache import Context, View
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.trajectory import Generator, fork
from sampling_cases import CONFIG, SETTINGS, distance, make_model

PROMPTS = ["a red circle", "two green stars above one cross and so on", "blue"]
SIZE = {"height": SETTINGS.height, "width": SETTINGS.width}


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(make_model(), SETTINGS)


def length(text: str) -> int:
    return len(make_model().tokenizer.encode(text)) + 2


def used(context: Context | View) -> list[int]:
    """Tokens that each context holds, gaps not counted."""
    view = context.view if isinstance(context, Context) else context
    return (np.asarray(view.rows.order) != INF).sum(1).tolist()


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
    unseen = generator.without_images(state)
    assert used(unseen) == texts
    assert np.asarray(unseen.view.next_rope).tolist() == texts  # a left-out image leaves no gap
    assert np.asarray(state.main.view.next_rope).tolist() == [text + 2 for text in texts]

    # The third turn: two images seen, guided away from all but the newest text.
    state = generator.look(state, image)
    seen = used(state.main)
    _, state = generator.think(state, ["one", "one", "one"])
    assert state.turn == 2 and used(state.unasked) == seen
    assert used(generator.without_images(state)) == [text + length("one") for text in texts]


def test_plain_drawing_has_contexts_of_its_own(generator):
    plain = generator.begin(["blue", "red"], seeds=[0, 1], system=False)
    assert used(plain.main) == [length("blue"), length("red")] and used(plain.unasked) == [0, 0]


def test_a_prompt_is_drawn_the_same_whatever_its_neighbours(generator):
    together = trajectories(generator, PROMPTS, seeds=[4, 5, 6])
    others = trajectories(generator, [PROMPTS[1], PROMPTS[2], PROMPTS[0]], seeds=[5, 9, 4])
    for mine, again in ((together[1], others[0]), (together[0], others[2])):
        for turn, same in zip(mine, again, strict=True):
            assert turn.text == same.text
            np.testing.assert_array_equal(turn.image, same.image)
    assert (together[2][0].image != others[1][0].image).any(), "another seed draws another image"
    assert (together[0][0].image != together[0][1].image).any(), "each turn has noise of its own"

    alone = trajectories(generator, PROMPTS[:1], seeds=[4])[0]  # another compiled shape
    for turn, same in zip(alone, together[0], strict=True):
        assert turn.text == same.text
        assert np.abs(turn.image.astype(int) - same.image).max() <= 1


@pytest.fixture(scope="module")
def on_one_device(generator):
    state = generator.begin(PROMPTS + PROMPTS[:1], seeds=[4, 5, 6, 7])
    return drawn_by_hand(generator, state)


def drawn_by_hand(generator: Generator, state) -> tuple[list, list]:
    """Texts and latents of both turns; the second looks at one picture whatever was drawn."""
    texts, latents = [], []
    for _ in range(2):
        more, state = generator.think(state)
        texts.append(more)
        latents.append(np.asarray(generator.draw_latent(state, **SIZE)))
        if not state.turn:
            picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
            state = generator.look(state, [picture] * len(more))
    return texts, latents


@pytest.mark.parametrize("config", [
    MeshConfig(fsdp=2, tensor=2, context=2),
    pytest.param(MeshConfig(data=2, fsdp=2), marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=1, tensor=2), marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=1, context=3), marks=pytest.mark.slow)], ids=str)
def test_any_mesh_draws_the_same(on_one_device, config):
    size = math.prod(dataclasses.astuple(config))
    generator = Generator(make_model(), SETTINGS, mesh=make_mesh(config, jax.devices()[:size]))
    state = generator.begin(PROMPTS + PROMPTS[:1], seeds=[4, 5, 6, 7])
    assert len(state.main.kv.key.sharding.device_set) == size
    texts, latents = drawn_by_hand(generator, state)
    assert texts == on_one_device[0]
    for latent, expected in zip(latents, on_one_device[1], strict=True):
        assert distance(latent, expected) < 1e-4
    assert generator.fit_batch(5) % (config.data * config.fsdp) == 0
    if config.fsdp > 1:
        with pytest.raises(ValueError, match="1 trajectories at once do not deal over"):
            generator.begin(["blue"], seeds=[0])


@pytest.mark.slow
def test_texts_do_not_depend_on_how_the_cache_grows(generator, on_one_device):
    other = Generator(make_model(), dataclasses.replace(SETTINGS, cache_multiple=200))
    texts, latents = drawn_by_hand(other, other.begin(PROMPTS + PROMPTS[:1], seeds=[4, 5, 6, 7]))
    assert texts == on_one_device[0]
    assert max(map(distance, latents, on_one_device[1])) < 1e-5


def test_self_cot_is_the_trajectory_stopped_early_and_states_can_be_forked(generator):
    (one,), (two,) = (trajectories(generator, PROMPTS[:1], seeds=[4], num_turns=n) for n in (1, 2))
    assert len(one) == 1 and len(two) == 2 and one[0].text == two[0].text
    np.testing.assert_array_equal(one[0].image, two[0].image)
    state = generator.begin(PROMPTS[:1], seeds=[4])
    held = jax.tree.map(np.asarray, state.main)
    (text,), after = generator.think(fork(state))
    assert text == two[0].text
    jax.tree.map(np.testing.assert_array_equal, held, jax.tree.map(np.asarray, state.main))
    np.testing.assert_array_equal(generator.draw(after)[0], one[0].image)
    assert generator.think(state)[0] == [text]
    assert all(leaf.is_deleted() for leaf in state.main.kv), "a cache is written where it lies, and used up"


def test_a_window_forgets_old_turns_and_nothing_else(generator):
    """The third turn after the second alone is what follows prompt, second thought and second picture."""
    (free,) = trajectories(generator, PROMPTS[:1], seeds=[4], num_turns=2)
    narrow = Generator(make_model(), dataclasses.replace(SETTINGS, window=1))
    (turns,) = trajectories(narrow, PROMPTS[:1], seeds=[4], num_turns=3)
    for turn, same in zip(turns, free):
        assert turn.text == same.text and (turn.image == same.image).all()
    state = dataclasses.replace(generator.begin(PROMPTS[:1], seeds=[4]), turn=1)
    _, state = generator.think(state, [free[1].text])
    state = generator.look(state, [free[1].image])
    whole = length("plan") + length(PROMPTS[0]) + length(free[1].text) + 2 * (2 * 3 + 2)
    assert state.turn == 2 and used(state.main) == [whole]
    (text,), state = generator.think(state)
    assert text == turns[2].text
    np.testing.assert_array_equal(generator.draw(state)[0], turns[2].image)


def test_a_prompt_ends_where_its_reflection_or_its_picture_says_so(generator):
    whole = trajectories(generator, PROMPTS, seeds=[4, 5, 6], num_turns=3)
    calm = re.escape(whole[1][1].text)
    talker = Generator(make_model(), dataclasses.replace(SETTINGS, stop_text=f"^{calm}$"))
    turns = trajectories(talker, PROMPTS, seeds=[4, 5, 6], num_turns=3)
    assert [len(each) for each in turns] == [3, 1, 3], "what asks for nothing is not drawn"
    changes = sorted(each[1].change(each[0]) for each in whole)
    watcher = Generator(make_model(), dataclasses.replace(SETTINGS, stop_change=(changes[0] + changes[1]) / 2))
    ended = trajectories(watcher, PROMPTS, seeds=[4, 5, 6], num_turns=3)
    for mine, all_turns in zip(ended, whole, strict=True):
        assert len(mine) == (2 if all_turns[1].change(all_turns[0]) == changes[0] else 3)
    for mine, all_turns in zip([*turns, *ended], [*whole, *whole], strict=True):
        for turn, same in zip(mine, all_turns):
            assert turn.text == same.text and (turn.image == same.image).all()
    for fields in ({"window": -1}, {"stop_text": "("}, {"stop_change": -1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            dataclasses.replace(SETTINGS, **fields)


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


def test_what_a_context_takes_is_told(generator):
    state = generator.begin(["a"], seeds=[0])
    said = used(state.main)[0] - generator._system.view.length    # that of a prompt, padded
    _, state = generator.think(state, ["blue"])
    largest = np.zeros((64, 64, 3), np.uint8)
    _, state = generator.think(generator.look(state, [largest]), ["blue"])
    per_token = sum(x.nbytes for x in state.main.kv) / state.main.view.capacity
    shorter = 2 * (SETTINGS.text.max_length - length("blue"))    # than texts may be
    told = lambda **more: generator.context_bytes(said=said, num_turns=2, **more)
    assert (used(state.main)[0] + shorter) * per_token == told()
    before = used(state.main)[0]
    state = generator.look(state, [largest])    # once more, as one that the user shows
    assert (used(state.main)[0] - before) * per_token == told(shown=1) - told()


def test_other_lengths_and_temperatures_of_texts_compile_nothing(generator, caplog):
    settings = lambda *pairs: [TextConfig(max_length=length, temperature=heat) for length, heat in pairs]
    state = generator.begin(["a", "a"], seeds=[1, 2])
    generator.write(state, settings=settings((4, 0.5), (6, 1.0)))
    with jax.log_compiles():
        written = generator.write(state, settings=settings((5, 0.2), (3, 2.0)))
        assert written.lengths.tolist() == [5, 3] and "Compiling" not in caplog.text
        generator.write(generator.begin(["a"] * 7, seeds=range(7)))
    assert "Compiling" in caplog.text    # it would have been told: no other test has so many


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(256, 272), (256, 1024), (1008, 272)])
def test_images_of_the_released_sizes_are_drawn_and_looked_at(height, width):
    """With position tables as large as the released model has."""
    config = dataclasses.replace(CONFIG, max_latent_size=64, vit_max_num_patch_per_side=70)
    settings = dataclasses.replace(
        SETTINGS, height=height, width=width, turn1=FlowConfig(num_timesteps=2),
        vae_transform=ImageTransform(16, 1024, 256), vit_transform=ImageTransform(14, 980, 224))
    drawer = Generator(dataclasses.replace(make_model(), config=config), settings)
    state = drawer.begin(["a"], seeds=[0])
    (image,) = drawer.draw(state)
    assert image.shape == (height, width, 3) and image.std() > 1
    seen = drawer.look(state, [image]).main.view
    (latents, patches) = (((w // p) * (h // p)) for (w, h), p in zip(drawer.sizes_seen(image), (16, 14)))
    assert latents == height * width // 256
    assert used(seen) == [used(state.main)[0] + latents + patches + 4]


def test_settings_are_checked_at_the_door():
    for cls, fields in ((FlowConfig, {"num_timesteps": 1}), (FlowConfig, {"timestep_shift": 0.0}),
                        (FlowConfig, {"cfg_renorm_min": 2.0}), (FlowConfig, {"taylorseer_order": 7}),
                        (FlowConfig, {"taylorseer_interval": 0}), (TextConfig, {"max_length": 0}),
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
    full = from_config_dict(SamplingConfig, load_config("configs/irgl_generate.py"))
    assert dataclasses.replace(full, text_multiple=default.text_multiple,
                               cache_multiple=default.cache_multiple) == default
    assert (default.turn1.cfg_interval, default.turn2.cfg_interval) == ((0.4, 1.0), (0.0, 1.0))
