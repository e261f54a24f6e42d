r"""Asks a model about pictures of scenes, and says which share of its answers is right.

    python -m irg_jax.examine --config configs/shapes_generate.py --checkpoint runs/shapes/base \
        --num 600 --out runs/shapes/eval/questions.json

The questions are those of `data_pipelines/shapes/language.py`: what, how many, which colour, where. Answers
are the likeliest tokens. OUT holds the table and every answer.
"""

import json
import pathlib
from typing import Any

from absl import flags
from tqdm import tqdm

from data_pipelines import command
from data_pipelines.config import from_config_dict
from data_pipelines.digests import write_json
from irg_jax.evaluation.questions import grade, make_question
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.modes import ModeConfig, infer
from irg_jax.sampling.opening import in_batches, load_generator


def main(values: Any) -> None:
    config = from_config_dict(SamplingConfig, values.config)
    mode = ModeConfig(understanding_output=True, do_sample=False)
    model, checkpoint = load_generator(values.checkpoint, config, prompts={})
    questions = [make_question(index, seed=values.seed, side=config.height) for index in range(values.num)]
    given = []
    with tqdm(total=len(questions), unit="question", disable=None) as progress:
        for batch, padded in in_batches(questions, min(config.batch_size, len(questions))):
            answers = infer(model, [(one.image, one.text) for one in padded], mode, seeds=[0] * len(padded))
            given += [answer.text for (answer,) in answers[:len(batch)]]
            progress.update(len(batch))
    table = grade(questions, given)
    answers = [{"question": one.text, "answer": one.answer, "given": text}
               for one, text in zip(questions, given)]
    out = pathlib.Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"checkpoint": checkpoint, "seed": values.seed, "table": table, "answers": answers})
    for kind, row in table.items():
        low, high = row["ci95"]
        print(f"{kind:14} {row['right']:.2f} [{low:.2f}, {high:.2f}]  of {row['asked']}")
    print(json.dumps({kind: round(row["right"], 3) for kind, row in table.items()}))


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "A model checkpoint, or the folder of a trained stage.")
    flags.DEFINE_string("out", None, "JSON file of the table and the answers.")
    flags.DEFINE_integer("num", 600, "Questions asked.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of scenes and questions.", lower_bound=0)
    flags.mark_flags_as_required(["config", "checkpoint", "out"])
    command.run(main)
