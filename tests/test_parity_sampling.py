"""Generation against the original's own values: `pytest tests/test_parity_sampling.py --golden DIR`.

The public generator runs, with a tokenizer of numbers and the golden noise; nothing here knows the
sizes of the first golden set.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import ImageTransform
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.trajectory import Generator
from parity_cases import ParityCase, relative

LATENT = 1e-4


class NumberTokenizer:
    """Ids as text: "3 11 206"."""

    def __init__(self, special: dict[str, int]):
        self.bos, self.eos = special["bos_token_id"], special["eos_token_id"]
        self.start_of_image, self.end_of_image = special["start_of_image"], special["end_of_image"]

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def case(golden_dir) -> ParityCase:
    return ParityCase(golden_dir)


def flow(values: dict) -> FlowConfig:
    return FlowConfig(**{**values, "cfg_interval": tuple(values["cfg_interval"])})


def transform(values: list[int]) -> ImageTransform:
    return ImageTransform(*values)


def numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def generator(case: ParityCase, noise: list[str], values: dict, **fields) -> Generator:
    """A generator in float32 whose image of turn i starts from the golden array noise[i]."""
    config = SamplingConfig(
        vae_transform=transform(values["vae_transform"]), posterior="mean", dtype="float32",
        vit_transform=transform(values["vit_transform"]), text_multiple=8, cache_multiple=32,
        **{"height": values["height"], "width": values["width"], **fields})
    model = dataclasses.replace(case.model, tokenizer=NumberTokenizer(case.values["special_tokens"]))
    draw_noise = lambda seeds, turn, shape: jnp.asarray(case.arrays[noise[turn]]).reshape(1, *shape)
    return Generator(model, config, draw_noise=draw_noise)


@pytest.fixture(scope="module")
def trajectory(case) -> Generator:
    values = case.values["infer"]
    return generator(case, ["infer.noise1", "infer.noise2"], values,
                     system_prompt=numbers(values["system"]), turn1=flow(values["turn1"]),
                     turn2=flow(values["turn2"]),
                     text=TextConfig(max_length=values["max_length"], do_sample=False))


def thought(generator: Generator, state) -> list[int]:
    written = generator.write(state)
    return np.asarray(written.ids)[0, :int(written.lengths[0])].tolist()


def grey_levels(name: str, actual, expected, record_property) -> None:
    error = int(np.abs(actual.astype(int) - expected.astype(int)).max())
    record_property(name, error)
    assert error <= 1, f"{name}: grey levels differ by up to {error}"


def first_turn(case: ParityCase, trajectory: Generator):
    """The state after the golden think1."""
    values = case.values["infer"]
    return trajectory.think(trajectory.begin([numbers(values["prompt"])], seeds=[0]),
                            [numbers(values["think1"])])[1]


def second_turn(case: ParityCase, trajectory: Generator):
    """The state that has looked at the golden image1."""
    return trajectory.look(first_turn(case, trajectory), [case.arrays["infer.image1_uint8"]])


def test_think_texts(case, trajectory):
    values = case.values["infer"]
    state = trajectory.begin([numbers(values["prompt"])], seeds=[0])
    assert thought(trajectory, state) == values["think1_raw"]
    assert thought(trajectory, second_turn(case, trajectory)) == values["think2_raw"]


@pytest.mark.parametrize("variant", ["", "_channel", "_nocfg"])
def test_first_image(case, trajectory, variant, record_property):
    settings = flow(case.values["infer"]["turn1" + variant])
    state = first_turn(case, trajectory)
    size = {"height": trajectory.config.height, "width": trajectory.config.width}
    latent = trajectory.draw_latent(state, flow=settings, **size)
    relative(f"Turn 1 latent {settings.cfg_renorm_type} {settings.cfg_text_scale}", latent[0],
             case.arrays["infer.latent1" + variant], LATENT)
    if not variant:
        grey_levels("Turn 1 image", trajectory.draw(state, flow=settings)[0],
                    case.arrays["infer.image1_uint8"], record_property)


@pytest.mark.parametrize("variant", ["", "_global"])
def test_second_image(case, trajectory, variant, record_property):
    values = case.values["infer"]
    settings = flow(values["turn2" + variant])
    _, state = trajectory.think(second_turn(case, trajectory), [numbers(values["think2"])])
    size = {"height": trajectory.config.height, "width": trajectory.config.width}
    latent = trajectory.draw_latent(state, flow=settings, **size)
    relative(f"Turn 2 latent {settings.cfg_renorm_type}", latent[0],
             case.arrays["infer.latent2" + variant], LATENT)
    if not variant:
        grey_levels("Turn 2 image", trajectory.draw(state, flow=settings)[0],
                    case.arrays["infer.image2_uint8"], record_property)


def test_whole_trajectory(case, trajectory, record_property):
    """Nothing given but the noise: the model's own texts and its own image as condition."""
    values = case.values["infer"]
    (turns,) = trajectory.trajectories([numbers(values["prompt"])], seeds=[0])
    for number, turn in enumerate(turns, 1):
        assert turn.text == numbers(values[f"think{number}"])
        grey_levels(f"Trajectory image {number}", turn.image,
                    case.arrays[f"infer.image{number}_uint8"], record_property)


def test_plain_text_to_image(case):
    values = case.values["t2i"]
    drawer = generator(case, ["t2i.noise"], {**case.values["infer"], **values},
                       turn1=flow(values["args"]))
    state = drawer.begin([numbers(values["prompt"])], seeds=[0], system=False)
    latent = drawer.draw_latent(state, height=values["height"], width=values["width"])
    relative("Text-to-image latent", latent[0], case.arrays["t2i.latent"], LATENT)


def test_editing(case):
    values, noise = case.values["edit"], ["edit.noise"] * 2
    editor = generator(case, noise, values, turn2=flow(values["args"]))
    state = editor.show([case.arrays["edit.image_uint8"]], [numbers(values["instruction"])], seeds=[0])
    latent = editor.draw_latent(state, height=values["height"], width=values["width"])
    relative("Editing latent", latent[0], case.arrays["edit.latent"], LATENT)


def test_understanding(case):
    values, logits = case.values["chat"], case.arrays["chat.logits"]
    patch, side = case.config.vit.patch_size, case.config.vit_max_num_patch_per_side
    whole = [patch, side * patch, patch]  # the golden image is given in its final size
    chat = generator(case, [], {**case.values["infer"], "vit_transform": whole},
                     text=TextConfig(max_length=len(logits), do_sample=False))
    state = chat.show([case.arrays["chat.image_uint8"]], [numbers(values["question"])], seeds=[0],
                      use_vae=False)
    written = chat.write(state, want_logits=True)
    length = int(written.lengths[0])
    assert np.asarray(written.ids)[0, :length].tolist() == values["answer_raw"]
    relative("Understanding: logits", written.logits[0, :length], logits[:length], LATENT)
