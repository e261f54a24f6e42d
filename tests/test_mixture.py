"""All nine kinds of records train together: IRGL's six modes, text to image, editing, vision-language."""

import json

import jax
import numpy as np
import pytest

from data_cases import data_config, write_rows
from data_pipelines.config import GroupConfig
from data_pipelines.pipeline import Packs
from data_pipelines.records import TextPart, parse_conversation
from data_pipelines.shapes.records import MODES, generator, record
from data_pipelines.tokenizer import train_tokenizer
from irg_jax.checkpoints.model import Model, load_model, save_model
from irg_jax.config import TrainConfig
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.sharding import MeshConfig
from irg_jax.training.loop import train
from irg_jax.training.losses import LossConfig
from irg_jax.training.optimizer import OptimizerConfig
from kind_cases import write_kinds

STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("mixture")
    kinds = tuple(group for group in write_kinds(folder / "data", count=6) if group.kind != "conversation")
    texts = []
    for mode in MODES:
        rows = [record(mode, generator(0, mode, index), split="train", side=64) for index in range(4)]
        write_rows(folder / "data" / "train" / mode / "a.parquet", rows)
        parts = parse_conversation(json.dumps(rows[0]), mode=mode, place="").parts
        texts += [part.text for part in parts if isinstance(part, TextPart)]
    tokens = train_tokenizer(texts, vocab_size=400)
    model = ModelConfig(
        LLMConfig(tokens.vocab_size, 32, 64, 2, 4, 2), ViTConfig(32, 48, 2, 2),
        VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=2), max_latent_size=8,
        vit_max_num_patch_per_side=8)
    host = lambda tree: jax.tree.map(np.asarray, tree)
    save_model(folder / "base", Model(
        model, tokens, host(Functional(lambda rngs: IRG(model, rngs=rngs)).init(0)),
        host(Functional(lambda rngs: make_autoencoder(model, rngs=rngs)).init(1))))
    groups = tuple(GroupConfig(mode) for mode in MODES) + kinds
    data = data_config(source=str(folder / "data"), groups=groups, packs_per_step=2, text_tokens=960,
                       vit_tokens=128, latent_tokens=128, images=12, vae_dropout=0.3, text_dropout=0.1,
                       vit_dropout=0.3)
    return TrainConfig(stage="stage1", init_from=str(folder / "base"), total_steps=STEPS, save_every=9, data=data,
                       dtype="float32", remat=False, mesh=MeshConfig(fsdp=1, context=8),
                       loss=LossConfig(vae_batch=4), optimizer=OptimizerConfig(learning_rate=1e-3))


def test_every_kind_trains(config, tmp_path):
    assert train(config, tmp_path) == STEPS
    lines = [json.loads(line) for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([[line["ce"], line["mse"], line["grad_norm"]] for line in lines])
    assert losses.shape == (STEPS, 3) and np.isfinite(losses).all() and (losses > 0).all()
    assert all(line["bad_records"] == 0 for line in lines)
    planner = Packs(config.data, load_model(config.init_from).tokenizer).planner
    entries = [entry for pack in range(STEPS * config.data.packs_per_step) for entry in planner[pack].entries]
    assert {entry.group for entry in entries} == {group.name for group in config.data.groups}
    draws = [planner.draws(entry) for entry in entries]
    assert not all(draw.keep.all() for draw in draws), "dropout is drawn"
