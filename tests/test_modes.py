"""The base model's modes through one call: each against the steps that it is made of."""

import dataclasses
import re

import numpy as np
import pytest

from data_pipelines.images import resize
from irg_jax import infer as infer_command
from irg_jax.sampling.modes import ModeConfig, infer, trajectories
from irg_jax.sampling.trajectory import Generator
from sampling_cases import SETTINGS, make_model
from test_sampling import length, used

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 33, 3), np.uint8)   # becomes 32 x 32, then 28 x 28
LATENTS, PATCHES = 2 * 2 + 2, 2 * 2 + 2
TEXT_MODE = ModeConfig(understanding_output=True)


class Watched(Generator):
    """A generator that keeps the states it draws and writes after, and the settings of each."""

    def __init__(self, config=SETTINGS):
        super().__init__(make_model(), config)
        self.drawn, self.written = [], []

    def draw(self, state, **settings):
        self.drawn.append((state, settings))
        return super().draw(state, **settings)

    def write(self, state, **settings):
        self.written.append((state, settings))
        return super().write(state, **settings)


@pytest.fixture
def generator() -> Watched:
    return Watched()


def test_a_prompt_alone_is_plain_drawing(generator):
    answers = infer(generator, [["blue"], ["a red circle"]], seeds=[3, 4])
    plain = Generator(make_model(), SETTINGS).text_to_image(["blue", "a red circle"], seeds=[3, 4])
    for (answer,), turn in zip(answers, plain, strict=True):
        assert answer.text == ""
        np.testing.assert_array_equal(answer.image, turn.image)


def test_an_image_and_an_instruction_are_an_edit_of_its_size(generator):
    answers = infer(generator, [(IMAGES[0], "blue"), (IMAGES[1], "a")], seeds=[0, 1])
    (state, settings), = generator.drawn
    assert settings == {"flow": SETTINGS.turn2, "height": 32, "width": 32}
    assert used(state.unasked) == [LATENTS + PATCHES] * 2
    assert used(generator.without_images(state)) == [length("blue"), length("a")]
    assert used(state.main) == [LATENTS + PATCHES + length(text) for text in ("blue", "a")]
    by_hand = Generator(make_model(), SETTINGS)
    images = [resize(image, SETTINGS.vae_transform) for image in IMAGES]
    state = by_hand.ask(by_hand.look(by_hand.start([0, 1], system=False), images), ["blue", "a"])
    expected = by_hand.draw(state, flow=SETTINGS.turn2, height=32, width=32)
    for (answer,), image in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer.image, image)


def test_understanding_sees_with_the_vit_alone_and_says_no_more_than_it_may(generator):
    mode = dataclasses.replace(TEXT_MODE, max_think_token_n=4, do_sample=False)
    (answer,), = infer(generator, [(IMAGES[0], "blue")], mode, seeds=[0])
    (state, settings), = generator.written
    assert answer.image is None and not generator.drawn
    assert used(state.main) == [PATCHES + length("blue")]
    assert settings["settings"] == [dataclasses.replace(SETTINGS.text, max_length=4, do_sample=False)]


def test_any_order_guides_away_from_the_last_text_and_from_all_images(generator):
    infer(generator, [("a", IMAGES[0], "blue", IMAGES[1])], seeds=[0])
    (state, _), = generator.drawn
    whole = length("a") + length("blue") + 2 * (LATENTS + PATCHES)
    assert used(state.main) == used(state.unasked) == [whole]   # an image was last: nothing more was asked
    assert used(generator.without_images(state)) == [length("a") + length("blue")]
    infer(generator, [("a", IMAGES[0], "blue")], seeds=[0])
    (state, _) = generator.drawn[-1]
    assert used(state.unasked) == [length("a") + LATENTS + PATCHES]


def test_a_thought_is_followed_and_not_what_guidance_leaves_out(generator):
    (answer,), = infer(generator, [["a red circle"]], ModeConfig(think=True), seeds=[2])
    (state, _), = generator.drawn
    system, asked = length("plan"), length("a red circle")
    assert used(state.unasked) == [system] and used(generator.without_images(state)) == [system + asked]
    assert used(state.main) == [system + asked + length(answer.text)]


def test_several_turns_are_the_trajectory_of_irg(generator):
    (answers,) = infer(generator, [["a red circle"]], ModeConfig(think=True, num_turns=2), seeds=[5])
    (turns,) = trajectories(Generator(make_model(), SETTINGS), ["a red circle"], seeds=[5], num_turns=2)
    for answer, turn in zip(answers, turns, strict=True):
        assert answer.text == turn.text
        np.testing.assert_array_equal(answer.image, turn.image)


def test_settings_have_the_names_of_bagel_and_win(generator):
    flow = {"cfg_text_scale": 2.5, "cfg_img_scale": 1.5, "cfg_interval": (0.1, 0.9),
            "cfg_renorm_type": "channel", "cfg_renorm_min": 0.5, "timestep_shift": 2.0, "num_timesteps": 3,
            "solver": "adams", "enable_taylorseer": True, "taylorseer_first": 1, "taylorseer_interval": 2,
            "taylorseer_order": 1}
    (answer,), = infer(generator, [["blue"]], ModeConfig(image_shape=(16, 48), **flow), seeds=[0])
    (_, settings), = generator.drawn
    assert answer.image.shape == (16, 48, 3)
    assert dataclasses.asdict(settings["flow"]) == flow


def test_conversations_of_any_forms_come_out_as_alone(generator):
    """What they share is done together: four starts, three texts to begin with, the drawing of two."""
    wide = np.random.default_rng(1).integers(0, 256, (32, 64, 3), np.uint8)
    conversations = [["a red circle"], [IMAGES[0], "blue"], ["blue"], [wide, "a"], ["a", IMAGES[1], "b", "c"]]
    together = infer(generator, conversations, seeds=range(5))
    assert [len(state.seeds) for state, _ in generator.drawn] == [2, 1, 1, 1]
    for number, (answer,) in enumerate(together):
        ((alone,),) = infer(generator, [conversations[number]], seeds=[number])
        assert np.abs(answer.image.astype(int) - alone.image).max() <= 1, number


def test_an_empty_conversation_is_refused(generator):
    with pytest.raises(ValueError, match="is empty"):
        infer(generator, [["a"], []], seeds=[0, 1])


def test_contradictions_are_refused():
    for fields, message in (({"num_turns": 0}, "num_turns is 0"), ({"num_turns": 2}, "set think"),
                            ({"num_turns": 2, "think": True, "understanding_output": True}, "not")):
        with pytest.raises(ValueError, match=message):
            ModeConfig(**fields)
    silent = Generator(make_model(), dataclasses.replace(SETTINGS, system_prompt=""))
    with pytest.raises(ValueError, match="no system_prompt"):
        infer(silent, [["a"]], ModeConfig(think=True), seeds=[0])


@pytest.mark.slow
def test_a_conversation_that_shows_an_image_follows_the_rules_of_turns_too():
    """It ends where the rule says so; with a window turn 3 sees what was shown, and turn 2 alone."""
    mode, shown = ModeConfig(think=True, num_turns=3), [np.full((32, 48, 3), 90, np.uint8), "a red circle"]
    (whole,) = infer(Generator(make_model(), SETTINGS), [shown], mode, seeds=[5])
    calm = Generator(make_model(), dataclasses.replace(SETTINGS, stop_text=f"^{re.escape(whole[2].text)}$"))
    assert len(infer(calm, [shown], mode, seeds=[5])[0]) == 2
    narrow = Generator(make_model(), dataclasses.replace(SETTINGS, window=1))
    (turns,) = infer(narrow, [shown], mode, seeds=[5])
    np.testing.assert_array_equal(turns[1].image, whole[1].image)
    image = resize(shown[0], SETTINGS.vae_transform)
    state = narrow.look(narrow.start([5]), [image])
    state = narrow.ask(dataclasses.replace(state, unasked=state.main.view), ["a red circle"])
    _, state = narrow.think(dataclasses.replace(state, turn=2), [whole[1].text])
    (text,), state = narrow.think(narrow.look(state, [whole[1].image]))
    assert text == turns[2].text != whole[2].text
    np.testing.assert_array_equal(narrow.draw(state, height=image.shape[0], width=image.shape[1])[0],
                                  turns[2].image)


def test_inputs_of_the_command_are_texts_and_checked_images(tmp_path):
    assert infer_command.read_input("a red circle") == "a red circle"
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, message in (("torn.png", "torn.png"), ("none.png", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            infer_command.read_input(f"@{tmp_path / name}")
