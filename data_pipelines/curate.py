"""Makes records of the six learning modes from prompts, as IRGL's were made.

    python -m data_pipelines.curate --config configs/curate.py --out DIR [--estimate] [--overwrite]

    first round      what the base model thinks and draws: a folder of irg_jax.generate, or endpoints
    better image     a painter's: an endpoint, a folder, or the image that a prompt brings
    thought, reflection    a vision-language critic's, in the four-part template

become the six modes:

    DIR/[<split>/]<mode>/0000.parquet ...   columns conversation, id, licence, provenance; pages with checksums
    DIR/rejected.jsonl                      what was not taken, and why
    DIR/manifest.json                       counts, causes, what it was made from, usage, sha256 of every file
    DIR.answers/                            what endpoints answered; it may be removed when all is done

Everything is written beside DIR and takes its name at the very end, so DIR is whole or absent. Whatever ended
it, Ctrl-C, kill -9, a spent budget or an endpoint that gave up: the same command goes on, and pays for no
answer twice.
`docs/data.md` has the templates, the filters and the limits.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict
from data_pipelines.curation.config import CurateConfig
from data_pipelines.curation.curating import Curated, answers_folder, curate, prepare
from data_pipelines.curation.estimate import describe


def main(values: Any) -> None:
    config = from_config_dict(CurateConfig, values.config)
    draft = prepare(config, out=values.out)
    rejected = len(draft.screened.rejections)
    print(f"{len(draft.screened.cases) + rejected:,} prompts, of which {rejected:,} are rejected before "
          "anything is asked")
    print(describe(draft.expenses))
    for name, endpoint in draft.opened.endpoints.items():
        if endpoint.usage.cost or endpoint.config.budget:
            limit = f" of a budget of {endpoint.config.budget:,.2f}" if endpoint.config.budget else ""
            print(f"{name}: {endpoint.usage.cost:,.2f} spent so far{limit}")
    sys.stdout.flush()
    if values.estimate:
        return
    print(tell(curate(draft, out=values.out, overwrite=values.overwrite), values.out))


def tell(done: Curated, out: str) -> str:
    """Lines for people."""
    lines = [f"{name}: {asked}" for name, asked in done.asked.items()]
    lines += [f"rejected, {cause}: {count:,}" for cause, count in done.rejections.items()]
    lines.append("cases: " + ", ".join(f"{count:,} {what}" for what, count in done.cases.items()))
    total = sum(done.counts.values())
    verb = "wrote" if done.written else "already made:"
    lines.append(f"{verb} {total:,} records of {sum(map(bool, done.counts.values()))} modes in {out}")
    if done.asked:
        folder = answers_folder(pathlib.Path(out))
        lines.append(f"answers are kept in {folder}; remove it when the data set will do")
    return "\n".join(lines)


if __name__ == "__main__":
    command.define_config("What to curate, e.g. configs/curate.py.")
    flags.DEFINE_string("out", None, "Folder of the data set.")
    flags.DEFINE_bool("estimate", False, "Tell what would be asked and cost, and end.")
    flags.DEFINE_bool("overwrite", False, "Replace another data set in --out.")
    flags.mark_flags_as_required(["config", "out"])
    command.run(main)
