r"""Makes the miniature's base: data, tokenizer, autoencoder, then a network that draws, sees, reads and edits.

    python -m irg_jax.make_base --config configs/shapes_base.py \
        --workdir runs/shapes_base --out runs/shapes_base/export

Every step is skipped if its result is there, and training resumes. On another machine the last result alone,
a model checkpoint at RUN/seeing, RUN/see, RUN/read or RUN/base, takes the place of all that led to it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from data_pipelines import command
from data_pipelines.build import build
from data_pipelines.config import BuildConfig, from_config_dict, load_config
from data_pipelines.pictures import load_pictures
from data_pipelines.records import TextPart, parse_conversation
from data_pipelines.sources import ParquetRows
from data_pipelines.tokenizer import Tokenizer, train_tokenizer
from irg_jax.checkpoints.bagel import export_folder
from irg_jax.checkpoints.bundle import is_exported
from irg_jax.checkpoints.model import PARAMS, Model, load_model, save_model
from irg_jax.config import TrainConfig
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.hosts import Hosts
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.drafting import make_drafts
from irg_jax.training.autoencoder import AutoencoderConfig, measure_latents, train_autoencoder
from irg_jax.training.encoder import EncoderConfig, train_encoder
from irg_jax.training.interrupt import Interrupt
from irg_jax.training.loop import train
from irg_jax.training.moments import compute_moments


@dataclasses.dataclass(frozen=True)
class DraftsConfig:
    """Pictures that the model draws of captions, to edit them in its last stage."""

    config: str                # how to draw
    data_config: str           # the data set that is built with them
    num: int
    seed: int


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """The recipe of a base checkpoint; paths of its stages are below the workdir."""

    data_config: str
    vocab_size: int
    llm: dict[str, int]
    vit: dict[str, int]
    vae: VAEConfig
    max_latent_size: int
    vit_max_num_patch_per_side: int
    autoencoder: AutoencoderConfig
    draw: TrainConfig          # the first stage, mostly text-to-image
    encoder: EncoderConfig
    see: TrainConfig           # from the first with the trained vision encoder: captions and questions too
    read: TrainConfig          # text alone
    train: TrainConfig         # all of it
    drafts: DraftsConfig
    mend: TrainConfig          # its own drafts as well; the base is this stage's EMA

    def model(self, vae: VAEConfig, vocab_size: int) -> ModelConfig:
        return ModelConfig(LLMConfig(vocab_size=vocab_size, **self.llm), ViTConfig(**self.vit), vae,
                           max_latent_size=self.max_latent_size,
                           vit_max_num_patch_per_side=self.vit_max_num_patch_per_side)


def make_tokenizer(data: pathlib.Path, modes: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE over texts of the data set, and of IRGL's records, which use the same words."""
    texts = []
    for mode in sorted(modes):
        source = ParquetRows(data / "train" / mode)
        for index in range(min(len(source), 2000)):
            record = parse_conversation(source[index].text, mode=mode, place=source[index].place)
            texts += [part.text for part in record.parts if isinstance(part, TextPart)]
    return train_tokenizer(texts + reasoning_texts(), vocab_size=vocab_size)


def reasoning_texts() -> list[str]:
    """Texts of IRGL records: their words get tokens, the network never sees them before stage 1."""
    from data_pipelines.shapes.records import MODES, generator, record
    texts = []
    for mode in MODES:
        for index in range(300):
            turns = record(mode, generator(7, mode, index), split="train", side=64)
            conversation = parse_conversation(json.dumps(turns), mode=mode, place=f"{mode} {index}")
            texts += [part.text for part in conversation.parts if isinstance(part, TextPart)]
    return texts


def prepare(config: BaseConfig, workdir: pathlib.Path) -> None:
    """WORKDIR/initial: trained tokenizer and autoencoder, fresh network."""
    data, modes = workdir / "data", [group.name for group in config.draw.data.groups]
    tokenizer = make_tokenizer(data, modes, config.vocab_size)
    images = load_pictures(data / "train", modes=modes, count=config.autoencoder.num_images)
    vae = Functional(lambda rngs: make_autoencoder(config.model(config.vae, config.vocab_size), rngs=rngs))
    vae_params = train_autoencoder(vae, config.autoencoder, images, workdir / "autoencoder")
    vae_config = measure_latents(vae, vae_params, config.vae, images[:1000])
    model = config.model(vae_config, tokenizer.vocab_size)
    params = jax.jit(lambda: Functional(lambda rngs: IRG(model, rngs=rngs)).init(config.draw.seed))()
    host = lambda tree: jax.tree.map(np.asarray, tree)
    save_model(workdir / "initial", Model(model, tokenizer, host(params), host(vae_params)))


def give_eyes(config: BaseConfig, drawn: pathlib.Path, workdir: pathlib.Path) -> None:
    """WORKDIR/seeing: the network that draws, with a vision encoder that was trained by itself."""
    if (workdir / "seeing").exists():
        return
    model = load_model(drawn)
    seeing = train_encoder(model.config, config.encoder, config.train.data.vit_transform, workdir / "encoder")
    params = model.params | jax.tree.map(np.asarray, seeing)
    save_model(workdir / "seeing", dataclasses.replace(model, params=params))


def draw_own(config: BaseConfig, drawer: pathlib.Path, workdir: pathlib.Path) -> None:
    """What the last stage learns from: drafts of the stage before, and records that start from them."""
    drafts, out = config.drafts, workdir / "drafts"
    make_drafts(str(drawer), from_config_dict(SamplingConfig, load_config(drafts.config)), drafts.num,
                seed=drafts.seed, out=out, is_planned=False)   # the base knows no others
    data = from_config_dict(BuildConfig, load_config(drafts.data_config))
    build(dataclasses.replace(data, drafts=str(out)), out=workdir / "own_data")
    stage = below(workdir, config.mend)
    compute_moments(stage.data, load_model(drawer), pathlib.Path(stage.data.moments), dtype=stage.dtype,
                    batch_size=16)


def below(workdir: pathlib.Path, stage: TrainConfig) -> TrainConfig:
    """The stage with its paths made those of the run."""
    data = dataclasses.replace(stage.data, source=str(workdir / stage.data.source),
                               moments=str(workdir / stage.data.moments))
    return dataclasses.replace(stage, init_from=str(workdir / stage.init_from), data=data)


def find_start(stages: Sequence[TrainConfig]) -> int | None:
    """The last stage whose weights are there as a model checkpoint; those before it are done or not needed."""
    known = [number for number, stage in enumerate(stages) if (pathlib.Path(stage.init_from) / PARAMS).is_dir()]
    return known[-1] if known else None


def make_data(config: BaseConfig, stages: Sequence[TrainConfig], workdir: pathlib.Path) -> int:
    """The data of all stages but the last, and its moments; the first checkpoint too if there is none yet.

    Returns: which stage to begin with.
    """
    build(from_config_dict(BuildConfig, load_config(config.data_config)), out=workdir / "data")
    if find_start(stages) is None:
        prepare(config, workdir)
    start = find_start(stages) or 0
    groups = {group.name: group for stage in stages[:-1] for group in stage.data.groups}
    data = dataclasses.replace(stages[0].data, groups=tuple(groups.values()))
    compute_moments(data, load_model(stages[start].init_from), pathlib.Path(data.moments),
                    dtype=stages[0].dtype, batch_size=16)
    return start


def main(values) -> None:
    config, workdir = from_config_dict(BaseConfig, values.config), pathlib.Path(values.workdir)
    stages = [below(workdir, stage)
              for stage in (config.draw, config.see, config.read, config.train, config.mend)]
    draw, *_, last = stages
    start = find_start(stages)
    if start is None or stages[start] is not last:    # that one learns from data of its own
        start = make_data(config, stages, workdir)
    interrupt = Interrupt(Hosts())
    for stage in stages[start:]:
        if stage is last:
            draw_own(config, pathlib.Path(last.init_from), workdir)
        reached = train(stage, workdir, accepted=values.accept_changes, interrupt=interrupt)
        if reached < stage.total_steps or interrupt.reached():
            return
        if stage is draw:
            give_eyes(config, workdir / draw.stage, workdir)
    if is_exported(pathlib.Path(values.out), workdir / last.stage):
        print(f"{values.out} is younger than the last checkpoint, and left as it is")
        return
    export_folder(load_model(workdir / last.stage), values.out, dtype="bfloat16")
    print(f"wrote {values.out}")


if __name__ == "__main__":
    command.define_config("The recipe, configs/shapes_base.py.")
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("out", None, "Folder of the finished checkpoint, in the released layout.")
    flags.DEFINE_list("accept_changes", [], "Fields of stages that may have changed since the run was begun.")
    flags.mark_flags_as_required(["config", "workdir", "out"])
    command.run(main)
