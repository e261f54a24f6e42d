"""All nine kinds of records train together: IRGL's six modes, text to image, editing, vision-language."""

import json

import jax
import numpy as np
import pytest

from data_cases import data_config, write_rows
from data_pipelines.config import DataConfig, GroupConfig
from data_pipelines.pipeline import make_iterator
from data_pipelines.records import TextPart, parse_conversation
from data_pipelines.shapes.records import MODES, generator, record
from data_pipelines.tokenizer import Tokenizer, train_tokenizer
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.training.losses import LossConfig
from irg_jax.training.optimizer import OptimizerConfig, make_optimizer
from irg_jax.training.state import create_state
from irg_jax.training.step import StepConfig, make_step
from kind_cases import write_kinds

STEPS = 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> tuple[DataConfig, Tokenizer]:
    folder = tmp_path_factory.mktemp("mixture")
    kinds = tuple(group for group in write_kinds(folder, count=6) if group.kind != "conversation")
    texts = []
    for mode in MODES:
        rows = [record(mode, generator(0, mode, index), split="train", side=64) for index in range(4)]
        write_rows(folder / "train" / mode / "a.parquet", rows)
        parts = parse_conversation(json.dumps(rows[0]), mode=mode, place="").parts
        texts += [part.text for part in parts if isinstance(part, TextPart)]
    config = data_config(source=str(folder), groups=(*map(GroupConfig, MODES), *kinds), packs_per_step=2,
                         text_tokens=960, vit_tokens=128, latent_tokens=128, images=12, vae_dropout=0.3,
                         text_dropout=0.1, vit_dropout=0.3)
    return config, train_tokenizer(texts, vocab_size=400)


def test_every_kind_trains(mixture):
    config, tokenizer = mixture
    geometry = ModelConfig(
        LLMConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2), ViTConfig(32, 48, 2, 2),
        VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=2), max_latent_size=8,
        vit_max_num_patch_per_side=8)
    model = Functional(lambda rngs: IRG(geometry, rngs=rngs))
    vae = Functional(lambda rngs: make_autoencoder(geometry, rngs=rngs))
    train = StepConfig(LossConfig(vae_batch=4), OptimizerConfig(learning_rate=1e-3), STEPS, 0, canvas=4,
                       remat="none")
    state = create_state(model.init(0), make_optimizer(train.optimizer, STEPS))
    step, vae_params = jax.jit(make_step(model, vae, train)), vae.init(1)
    data, losses, entries = make_iterator(config, tokenizer), [], []
    for number in range(STEPS):
        state, metrics = step(state, vae_params, next(data))
        losses.append([float(metrics[name]) for name in ("ce", "mse", "grad_norm")])
        for index in range(number * config.packs_per_step, (number + 1) * config.packs_per_step):
            entries += data.packs.planner[index].entries
    data.close()
    assert np.isfinite(losses).all() and (np.array(losses) > 0).all()
    assert data.counters == {"bad_records": 0, "oversize_records": 0}
    assert {entry.group for entry in entries} == {group.name for group in config.groups}
    assert not all(data.packs.planner.draws(entry).keep.all() for entry in entries), "dropout is drawn"
