r"""One conversation with a model: texts and images in any order in, a text or images out.

    python -m irg_jax.infer --config configs/shapes_generate.py --checkpoint runs/shapes/base \
        --input @runs/shapes/generate/0000/turn1.png --input "paint the background grey." \
        --out runs/shapes/edited

edits a picture; --input "a red circle" alone draws one, with --think after a thought and with --num_turns 2 as
IRG does; with --understanding_output the answer is a text. OUT/turn1.txt, turn1.png, ... hold what came out.
Settings have BAGEL's names (--cfg_text_scale, --max_think_token_n, ...); what is not given is the config's.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines import command
from data_pipelines.config import from_config_dict
from data_pipelines.images import read_image
from irg_jax.parallel.sharding import find_mesh
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.modes import ModeConfig, infer
from irg_jax.sampling.opening import load_generator

SETTINGS = {
    flags.DEFINE_boolean: ("think", "understanding_output", "do_sample", "enable_taylorseer"),
    flags.DEFINE_integer: ("num_turns", "max_think_token_n", "num_timesteps", "taylorseer_first",
                           "taylorseer_interval", "taylorseer_order"),
    flags.DEFINE_float: ("text_temperature", "cfg_text_scale", "cfg_img_scale", "cfg_renorm_min",
                         "timestep_shift"),
    flags.DEFINE_string: ("cfg_renorm_type", "solver"),
    flags.DEFINE_list: ("cfg_interval", "image_shape"),
}


def read_input(text: str) -> str | np.ndarray:
    """A text, or the picture uint8 [H, W, 3] of "@file". Raises: ValueError naming the file."""
    return read_image(text[1:]) if text.startswith("@") else text


def read_mode(values: Any) -> ModeConfig:
    """The settings that were given. Raises: ValueError naming the field."""
    given = {name: getattr(values, name) for names in SETTINGS.values() for name in names}
    for name, kind in (("cfg_interval", float), ("image_shape", int)):
        try:
            given[name] = given[name] and tuple(map(kind, given[name]))
        except ValueError as error:
            raise ValueError(f"--{name} is {','.join(given[name])}; give two numbers") from error
    return from_config_dict(ModeConfig, {name: value for name, value in given.items() if value is not None})


def main(values: Any) -> None:
    mode, inputs = read_mode(values), [read_input(text) for text in values.input]
    out = pathlib.Path(values.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{values.out!r} is not empty; choose another --out")
    texts = {f"--input {number}": one for number, one in enumerate(inputs, 1) if isinstance(one, str)}
    config = from_config_dict(SamplingConfig, values.config)
    generator, _ = load_generator(values.checkpoint, config, prompts=texts,
                                  mesh=find_mesh(values.mesh))
    (answers,) = infer(generator, [inputs], mode, seeds=[values.seed])
    out.mkdir(parents=True, exist_ok=True)
    for number, answer in enumerate(answers, 1):
        if answer.text:
            print(answer.text)
            (out / f"turn{number}.txt").write_text(answer.text + "\n", encoding="utf-8")
        if answer.image is not None:
            Image.fromarray(answer.image).save(out / f"turn{number}.png")
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} into {values.out}")


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "A model checkpoint, or the folder of a trained stage.")
    flags.DEFINE_multi_string("input", None, "A text, or @FILE for an image; given several times, in order.")
    flags.DEFINE_string("out", None, "Folder of what comes out; new or empty.")
    flags.DEFINE_integer("seed", 0, "Of text and noise.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("mesh", "", "Devices to draw on, like tensor=2; by default the first alone.")
    for define, names in SETTINGS.items():
        for name in names:
            define(name, None, "See irg_jax/sampling/modes.py.")
    flags.mark_flags_as_required(["config", "checkpoint", "input", "out"])
    command.run(main)
