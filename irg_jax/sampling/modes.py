"""Every mode of the base model through one call: texts and images in any order in, texts and images out.

    (answer,), = infer(generator, [["a red circle"]], seeds=[0])                                text to image
    (answer,), = infer(generator, [[image, "make it blue"]], seeds=[0])                         editing
    (answer,), = infer(generator, [[image, "what is it?"]], ModeConfig(understanding_output=True), seeds=[0])
    first, second = infer(generator, [["a red circle"]], ModeConfig(think=True, num_turns=2), seeds=[0])[0]

Source: `interleave_inference` of BAGEL's inferencer.py; for several turns IRG's tiif_multi_turn_gen.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from data_pipelines.images import resize
from irg_jax.sampling.config import FlowConfig, TextConfig
from irg_jax.sampling.trajectory import Generator, State

S = TypeVar("S", FlowConfig, TextConfig)
Conversation = Sequence[str | np.ndarray]   # what is said and shown, in order; images uint8 [H, W, 3]


class Answer(NamedTuple):
    """What came of one turn: a text (empty if none was asked for), an image uint8 [H, W, 3] (or None)."""

    text: str
    image: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class ModeConfig:
    """What is wanted, by BAGEL's names. Where None is left, the generator's own settings count.

    Those are the ones of turn 1, or of turn 2 if an image was shown: as published, BAGEL's defaults for
    drawing and for editing.
    """

    think: bool = False                 # the system prompt first, and a text before the image
    understanding_output: bool = False  # a text alone; images are seen by the ViT alone
    num_turns: int = 1                  # images drawn, each after a look at the one before: IRG
    image_shape: tuple[int, int] | None = None   # height and width; else those of the last image shown
    max_think_token_n: int | None = None
    do_sample: bool | None = None
    text_temperature: float | None = None
    cfg_text_scale: float | None = None
    cfg_img_scale: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_renorm_type: Literal["global", "channel", "text_channel"] | None = None
    cfg_renorm_min: float | None = None
    timestep_shift: float | None = None
    num_timesteps: int | None = None
    solver: Literal["euler", "adams"] | None = None

    def __post_init__(self):
        if self.num_turns < 1:
            raise ValueError(f"num_turns is {self.num_turns}; it must be positive")
        if self.num_turns > 1 and (self.understanding_output or not self.think):
            raise ValueError(f"num_turns is {self.num_turns}: several turns think and draw; set think, and not "
                             "understanding_output")

    def flow(self, settings: FlowConfig) -> FlowConfig:
        """The settings of an image, with what is given here."""
        names = [field.name for field in dataclasses.fields(FlowConfig)]
        return _replace(settings, {name: getattr(self, name) for name in names})

    def text(self, settings: TextConfig) -> TextConfig:
        """The settings of a text, with what is given here."""
        return _replace(settings, {"max_length": self.max_think_token_n, "do_sample": self.do_sample,
                                   "temperature": self.text_temperature})


def infer(generator: Generator, conversations: Sequence[Conversation], mode: ModeConfig = ModeConfig(), *,
          seeds: Sequence[int]) -> list[tuple[Answer, ...]]:
    """The answers to each conversation, one a turn.

    All conversations of a call have texts and images at the same places, and images of one size there.

    Raises: ValueError if they have not, if one is empty, or if thinking is asked for without a system prompt.
    """
    if mode.think and not generator.config.system_prompt:
        raise ValueError("think is set, but the generator has no system_prompt that says how to think")
    write = lambda state: generator.decode(generator.write(state, settings=mode.text(generator.config.text)))
    state, (height, width) = read(generator, conversations, mode, seeds)
    if mode.understanding_output:
        return [(Answer(text, None),) for text in write(state)]
    turns = []
    for number in range(mode.num_turns):
        if number:
            state = generator.look(state, turns[-1][1])
        texts = write(state) if mode.think else [""] * len(conversations)
        if mode.num_turns > 1:
            _, state = generator.think(state, texts)
        elif mode.think:   # here, and not in IRG, the context without images is also one without the thought
            state = dataclasses.replace(state, main=generator.append_text(state.main, texts))
        flow = mode.flow(generator.config.flow(state.turn))
        turns.append((texts, generator.draw(state, flow=flow, height=height, width=width)))
    return [tuple(Answer(texts[i], images[i]) for texts, images in turns) for i in range(len(conversations))]


def read(generator: Generator, conversations: Sequence[Conversation], mode: ModeConfig,
         seeds: Sequence[int]) -> tuple[State, tuple[int, int]]:
    """The state after all that is said and shown, and the size (height, width) of the image to be drawn.

    As in the original an image is resized by the VAE rule first, then once more for each encoder.
    """
    size = generator.config.height, generator.config.width
    state = generator.start(seeds, system=mode.think)
    for place, items in enumerate(_columns(conversations)):
        if isinstance(items[0], str):
            state = generator.ask(state, items)
            continue
        images = [resize(image, generator.config.vae_transform) for image in items]
        shapes = {image.shape[:2] for image in images}
        if len(shapes) > 1:
            raise ValueError(f"images at place {place} come out at {sorted(shapes)}; one call needs one size")
        size = shapes.pop()
        state = generator.look(state, images, use_vae=not mode.understanding_output)
        state = dataclasses.replace(state, unasked=state.main.view)
    return state, mode.image_shape or size


def _columns(conversations: Sequence[Conversation]) -> list[tuple]:
    """What stands at each place, checked to be of one kind."""
    kinds = {tuple("text" if isinstance(item, str) else "image" for item in one) for one in conversations}
    if len(kinds) != 1 or () in kinds:
        raise ValueError(f"conversations have the forms {sorted(kinds)}; those of one call need one, not empty")
    return list(zip(*conversations, strict=True))


def _replace(settings: S, values: dict[str, Any]) -> S:
    return dataclasses.replace(settings, **{name: value for name, value in values.items() if value is not None})
