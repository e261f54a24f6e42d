"""How to draw: the settings of a trajectory. Defaults are IRG's published ones."""

import dataclasses
import re
from typing import Literal

from data_pipelines.config import ImageTransform


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How one image is drawn. No guidance at all unless `cfg_text_scale` is over 1."""

    num_timesteps: int = 50    # points from 1 to 0, both counted: one Euler step fewer
    timestep_shift: float = 3.0
    cfg_text_scale: float = 4.0
    cfg_img_scale: float = 1.0
    cfg_interval: tuple[float, float] = (0.4, 1.0)  # guided where low < t <= high, t shifted
    cfg_renorm_type: Literal["global", "channel", "text_channel"] = "global"
    cfg_renorm_min: float = 0.0  # the lower clamp of the rescale; the upper is 1
    # "adams" follows how the velocity changes (Adams-Bashforth of order 2): for fewer steps.
    solver: Literal["euler", "adams"] = "euler"
    # Extrapolates what the network's layers add, but for the first steps and each so many: see taylorseer.py.
    enable_taylorseer: bool = False
    taylorseer_first: int = 5
    taylorseer_interval: int = 3
    taylorseer_order: int = 1    # of the polynomial: 0 takes the last computed step's

    def __post_init__(self):
        if self.num_timesteps < 2 or self.timestep_shift <= 0:
            raise ValueError(f"num_timesteps {self.num_timesteps} must be 2 or more and "
                             f"timestep_shift {self.timestep_shift} positive")
        if self.taylorseer_first < 1 or self.taylorseer_interval < 1 or not 0 <= self.taylorseer_order <= 6:
            raise ValueError(f"taylorseer_first {self.taylorseer_first} and taylorseer_interval "
                             f"{self.taylorseer_interval} must be 1 or more, taylorseer_order "
                             f"{self.taylorseer_order} from 0 to 6")
        if not 0 <= self.cfg_renorm_min <= 1:
            raise ValueError(f"cfg_renorm_min {self.cfg_renorm_min} must be in [0, 1]")

    @property
    def needs_cfg_img(self) -> bool:
        """Whether any step is guided away from the context without images."""
        return self.cfg_text_scale > 1 and self.cfg_img_scale > 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How a text is written."""

    max_length: int = 4096   # tokens, the opening one counted
    temperature: float = 0.3
    do_sample: bool = True   # False takes the likeliest token

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be positive")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; use a positive one, or do_sample "
                             "= False for the likeliest token")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """A trajectory: prompt, then in every turn a think text and an image."""

    turn1: FlowConfig = FlowConfig()
    turn2: FlowConfig = FlowConfig(cfg_img_scale=2.0, cfg_interval=(0.0, 1.0),
                                   cfg_renorm_type="text_channel")  # and every later turn
    text: TextConfig = TextConfig()
    height: int = 1024
    width: int = 1024
    num_turns: int = 2
    window: int = 0            # turns before the newest that a turn may look back at; 0 is all
    stop_text: str = ""        # regular expression: a later think text that has it is the end, nothing is drawn
    stop_change: float = 0.0   # mean grey levels: an image that differs less from the one before is the last
    system_prompt: str = ""    # text, or @file
    vae_transform: ImageTransform = ImageTransform(stride=16, max_size=1024, min_size=512)
    vit_transform: ImageTransform = ImageTransform(stride=14, max_size=980, min_size=224)
    posterior: Literal["mean", "sample"] = "sample"  # of an image that is looked at
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weights: Literal["int8", "float8_e4m3fn"] | None = None   # what kernels of the decoder are rounded to
    batch_size: int = 1
    text_multiple: int = 64    # texts are padded to multiples of this many tokens, and
    cache_multiple: int = 256  # contexts of this: fewer shapes, fewer compilations

    def __post_init__(self):
        for name in ("height", "width", "num_turns", "batch_size", "text_multiple",
                     "cache_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.window < 0 or self.stop_change < 0:
            raise ValueError(f"window {self.window} and stop_change {self.stop_change} must not be negative")
        try:
            re.compile(self.stop_text)
        except re.error as error:
            raise ValueError(f"stop_text {self.stop_text!r} is no regular expression: {error}") from error

    def flow(self, turn: int) -> FlowConfig:
        """The settings of a turn, counted from 0."""
        return self.turn1 if turn == 0 else self.turn2
