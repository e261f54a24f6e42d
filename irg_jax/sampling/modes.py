"""Every mode of the base model through one call: texts and images in any order in, texts and images out.

    (answer,), = infer(generator, [["a red circle"]], seeds=[0])                                text to image
    (answer,), = infer(generator, [[image, "make it blue"]], seeds=[0])                         editing
    (answer,), = infer(generator, [[image, "what is it?"]], ModeConfig(understanding_output=True), seeds=[0])
    first, second = infer(generator, [["a red circle"]], ModeConfig(think=True, num_turns=2), seeds=[0])[0]

Source: `interleave_inference` of BAGEL's inferencer.py; for several turns IRG's tiif_multi_turn_gen.py.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from collections.abc import Generator as Coroutine
from typing import Any, Literal, TypeVar

import numpy as np

from data_pipelines.images import resize
from irg_jax.sampling import steps
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.steps import Job, Step, run_jobs
from irg_jax.sampling.trajectory import Generator, Given, Turn

S = TypeVar("S", FlowConfig, TextConfig)
Conversation = Sequence[str | np.ndarray]   # what is said and shown, in order; images uint8 [H, W, 3]


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
    enable_taylorseer: bool | None = None
    taylorseer_first: int | None = None
    taylorseer_interval: int | None = None
    taylorseer_order: int | None = None

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
          seeds: Sequence[int]) -> list[tuple[Turn, ...]]:
    """The turns that answer each conversation. What conversations have in common is done together.

    Raises: ValueError if one is empty, or if thinking is asked for without a system prompt.
    """
    check_thinking(mode, generator.config)
    jobs = [Job(converse(generator, each, mode, seed=seed))
            for each, seed in zip(conversations, seeds, strict=True)]
    return run_jobs(generator, jobs)


def check_thinking(mode: ModeConfig, config: SamplingConfig) -> None:
    """Raises: ValueError if thinking is asked for, but nothing says how."""
    if mode.think and not config.system_prompt:
        raise ValueError("think is set, but the generator has no system_prompt that says how to think")


def converse(generator: Generator, conversation: Conversation, mode: ModeConfig, *, seed: int,
             given: Given = Given(), tell: Callable[[int, str | np.ndarray], None] = lambda turn, made: None,
             ) -> Coroutine[Step, Any, tuple[Turn, ...]]:
    """The steps of one conversation, see `steps.Job`; it comes to its turns.

    They are fewer where `stop_text` or `stop_change` of the configuration ends it.

    Args: given is what takes the place of the model's own texts and first image; tell is called with the turn
        and each text and image as soon as it is there.
    Raises: ValueError if the conversation is empty, before its first step.
    """
    config = generator.config
    if not conversation:
        raise ValueError("a conversation is empty; say or show something")
    height, width = yield from _read(generator, conversation, mode, seed)
    shown = count_images(conversation)   # settings count images shown, too
    turns: list[Turn] = []
    for number in range(mode.num_turns):
        if number:
            yield from _look_again(generator, conversation, mode, seed, turns)
        text, has_ended = yield from _write(given.text(number), mode, config)
        if number and config.stop_text and re.search(config.stop_text, text):
            break
        if text:
            tell(number, text)
        if mode.understanding_output:
            return (Turn(text, None, has_ended),)
        if mode.think:
            # In a single turn, and not in IRG, the context without images also lacks the thought.
            yield Step(steps.think if mode.num_turns > 1 else steps.add, text)
        image = None if number else given.image
        if image is None:
            image = yield Step(steps.draw, statics=(mode.flow(config.flow(shown + number)), height, width))
        tell(number, image)
        turns.append(Turn(text, image, has_ended))
        if number and turns[-1].change(turns[-2]) < config.stop_change:
            break
    return tuple(turns)


def trajectories(generator: Generator, prompts: Sequence[str], *, seeds: Sequence[int],
                 num_turns: int | None = None, given: Sequence[Given] = ()) -> list[tuple[Turn, ...]]:
    """IRG's turns of each prompt; `num_turns` as configured if None. One turn is self-CoT.

    All are one batch until the last has ended, so that the same prompts and seeds are the same images. With
    other neighbours they differ by rounding, as texts are padded to the longest one.

    Args: given is what takes the place of the model's own texts and images, one a prompt if any.
    """
    mode = ModeConfig(think=True, num_turns=num_turns or generator.config.num_turns)
    jobs = [Job(converse(generator, [prompt], mode, seed=seed, given=one)) for prompt, seed, one
            in zip(prompts, seeds, given or [Given()] * len(prompts), strict=True)]
    return run_jobs(generator, jobs, size=generator.fit_batch(len(jobs)))


def _read(generator: Generator, conversation: Conversation, mode: ModeConfig, seed: int
          ) -> Coroutine[Step, Any, tuple[int, int]]:
    """Reads all that is said and shown; comes to the size (height, width) of the image to be drawn.

    As in the original an image is resized by the VAE rule first, then once more for each encoder.
    """
    size = generator.config.height, generator.config.width
    yield Step(steps.start, seed, (mode.think,))
    for item in conversation:
        if isinstance(item, str):
            yield Step(steps.ask, item)
            continue
        image = resize(item, generator.config.vae_transform)
        size = image.shape[:2]
        yield Step(steps.see, image, (not mode.understanding_output,), generator.sizes_seen(image))
    return mode.image_shape or size


def _look_again(generator: Generator, conversation: Conversation, mode: ModeConfig, seed: int,
                turns: Sequence[Turn]) -> Coroutine[Step, Any, None]:
    """A look at the newest image; turns that the window leaves out were never there."""
    first = len(turns) - generator.config.window
    if not generator.config.window or first <= 0:
        yield Step(steps.look, turns[-1].image, shape=generator.sizes_seen(turns[-1].image))
        return
    yield from _read(generator, conversation, mode, seed)
    for number, turn in enumerate(turns[first:], count_images(conversation) + first):
        # What is drawn at random is that of the turn's own number.
        yield Step(steps.recall, turn.text, (number,))
        yield Step(steps.look, turn.image, shape=generator.sizes_seen(turn.image))


def count_images(conversation: Conversation) -> int:
    return sum(not isinstance(item, str) for item in conversation)


def _write(text: str | None, mode: ModeConfig, config: SamplingConfig
           ) -> Coroutine[Step, Any, tuple[str, bool]]:
    """The text of a turn, by the model if there is none, and whether it ended."""
    if text is not None or not (mode.think or mode.understanding_output):
        return text or "", True
    return (yield Step(steps.write, mode.text(config.text)))


def _replace(settings: S, values: dict[str, Any]) -> S:
    return dataclasses.replace(settings, **{name: value for name, value in values.items() if value is not None})
