r"""Draws prompts with a trained model.

    python -m irg_jax.generate --config configs/shapes_generate.py --checkpoint runs/shapes/stage2 \
        --prompt "two red circles left of a blue square" --out runs/shapes/generated

OUT/0000/turn1.txt, turn1.png, turn2.txt, ...   what each turn thought and drew
OUT/0000/trajectory.png                         all of it in one picture
OUT/0000/prompt.json                            prompt, seed, checkpoint and settings

One folder a prompt, which takes its name when it is whole: after an interruption the same command
goes on. `--config.text.temperature=0.5` overrides a field.

    --prompts FILE --batch 8 --mesh data=4,tensor=2

draws those of a file, eight at once, on eight devices: `tensor` splits the network (1, 2 or 4 ways), `data` and
`fsdp` deal the prompts, and `context` deals what guidance compares. A line of a .jsonl file is

    {"prompt": "two stars", "seed": 3, "texts": [null, "draw them again, in red"], "image": "mine.png"}

where all but the prompt may be missing: `texts` take the place of think texts of the model, `image` that of the
first picture.
"""

from typing import Any

from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from irg_jax.evaluation.folders import SEEDS, Order, generate, read_orders
from irg_jax.parallel.sharding import find_mesh
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.opening import load_generator


def main(values: Any) -> None:
    if bool(values.prompt) == bool(values.prompts):
        raise ValueError("give either --prompt or --prompts")
    config = from_config_dict(SamplingConfig, values.config)
    if any(not prompt.strip() for prompt in values.prompt or ()):
        raise ValueError("--prompt is empty; say what to draw")
    orders = [Order(prompt) for prompt in values.prompt or ()] or read_orders(values.prompts)
    texts = {f"prompt {number}": order.prompt for number, order in enumerate(orders, 1)}
    texts |= {f"text {place} of prompt {number}": text for number, order in enumerate(orders, 1)
              for place, text in enumerate(order.given.texts, 1) if text is not None}
    generator, checkpoint = load_generator(values.checkpoint, config, prompts=texts,
                                           mesh=find_mesh(values.mesh))
    pace = generate(orders, generator=generator, seed=values.seed, checkpoint=checkpoint, out=values.out,
                    num_turns=values.num_turns or config.num_turns,
                    batch_size=values.batch or config.batch_size)
    rest = "" if pace.drawn == len(orders) else "; the rest was there"
    print(f"drew {pace.drawn} of {len(orders)} prompts into {values.out}{rest}{pace}")


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "A model checkpoint, or the folder of a trained stage.")
    flags.DEFINE_multi_string("prompt", None, "What to draw; may be given several times.")
    flags.DEFINE_string("prompts", None, "A file with a prompt a line, or .jsonl: see above.")
    flags.DEFINE_string("out", None, "Folder of the drawings.")
    flags.DEFINE_integer("seed", 0, "Of texts and noise.", lower_bound=0, upper_bound=SEEDS - 1)
    flags.DEFINE_integer("num_turns", None, "Images a prompt; by default the config's.",
                         lower_bound=1)
    flags.DEFINE_integer("batch", None, "Prompts drawn at once; by default the config's.",
                         lower_bound=1)
    flags.DEFINE_string("mesh", "", "Devices to draw on, like data=4,tensor=2; by default the first alone.")
    flags.mark_flags_as_required(["config", "checkpoint", "out"])
    command.run(main)
