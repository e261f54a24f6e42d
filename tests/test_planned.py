"""What planned packs hold, against the visibility rule itself, and the work in them against a traced step."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from jax.interpreters import partial_eval

from benchmarks.train_step import official_flops
from checkpoint_cases import CONFIG
from data_pipelines.batch import Rows, visible
from data_pipelines.config import DataConfig, ImageTransform, from_config_dict, load_config
from data_pipelines.planning import Planner
from data_pipelines.simulation import simulate
from irg_jax.config import TrainConfig
from irg_jax.models.config import LLMConfig
from irg_jax.models.groups import group_of, paths_of
from irg_jax.models.lora import LoraConfig, is_adapter
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.training.abstract import trace_encoder, trace_step
from irg_jax.training.optimizer import OptimizerConfig
from irg_jax.training.planned import (
    Planned,
    count_pairs,
    count_passes,
    count_tiles,
    lay_out,
    model_flops,
    plan_packs,
)


@pytest.fixture(scope="module")
def config() -> DataConfig:
    """Stage 1 with small images."""
    data = from_config_dict(TrainConfig, load_config("configs/irgl_stage1.py")).data
    return dataclasses.replace(data, text_tokens=2560, vit_tokens=128, latent_tokens=128, images=8,
                               vae_transform=ImageTransform(16, 64, 32),
                               vit_transform=ImageTransform(14, 56, 28))


@pytest.fixture(scope="module")
def pack(config):
    tables = simulate(config, records=300)
    return lay_out(Planner(config, tables)[0], config, tables)


def joined(pack) -> Rows:
    return Rows(*(np.concatenate(field) for field in zip(pack.text_rows, pack.vit_rows, pack.latent_rows)))


def test_a_laid_out_pack_costs_what_was_planned(config):
    tables = simulate(config, records=300)
    planner = Planner(config, tables)
    for index in range(3):
        pack = lay_out(planner[index], config, tables)
        used = [int(np.sum(rows.last >= 0)) for rows in (pack.text_rows, pack.vit_rows, pack.latent_rows)]
        assert used == list(planner[index].cost[:3])


def test_bagels_own_formula(config, pack):
    """6 (layers + embedding + head) a token and 12 a pair of a sample, dense: the MFU of the original."""
    tables = simulate(config, records=300)
    planner = Planner(config, tables)
    sizes = []
    for entry in planner[0].entries:
        draws = planner.draws(entry)
        sizes.append(int(tables[entry.group].record(entry.index)[draws.chosen[draws.keep], 1:4].sum()))
    layer = 48 * (48 + 2 * 24 + 48) + 3 * 48 * 96    # q, k and v, o; three of the MLP
    llm = LLMConfig(vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=6, num_key_value_heads=3)
    wanted = (6 * (2 * layer + 2 * 100 * 48) * sum(sizes)
              + 12 * 2 * 48 * sum(size**2 for size in sizes))
    assert official_flops(pack, dataclasses.replace(CONFIG, llm=llm)) == wanted


def test_pairs_and_tiles_are_those_of_the_rule(pack):
    rows = joined(pack)
    seen = visible(rows, rows) & (rows.last >= 0)[:, None]
    assert count_pairs(rows) == seen.sum() > 0
    for tile in (64, 128):
        tiles = seen.reshape(len(seen) // tile, tile, -1, tile).any(axis=(1, 3))
        assert tiles.sum() <= count_tiles(rows, tile) <= 1.2 * tiles.sum()
    assert count_tiles(rows, 1) == seen.sum()   # tiles of one pair are the pairs


def test_plans_are_full_and_sparse(config):
    planned = plan_packs(config, packs=3, tile=128)
    assert 0.9 < planned.fill <= 1
    assert 0 < planned.visible_ratio < planned.visited_ratio < 1
    assert planned.visible_ratio == pytest.approx(planned.pairs / 2816**2, rel=1e-6)


TEXT, VIT, LATENT, PACKS = 64, 36, 25, 2
SLOTS = TEXT + VIT + LATENT


@pytest.fixture(scope="module")
def trace():
    """(operations of a traced step with fields of a config, ours without and with it known what trains)."""
    @functools.cache
    def run(frozen=(), adapted=()):
        config, planned = small_step(), Planned(TEXT, VIT, LATENT, 1.0, SLOTS**2, VIT**2, 1.0, 1.0)
        config = dataclasses.replace(config, lora=LoraConfig(adapted, rank=1),
                                     optimizer=OptimizerConfig(frozen=frozen))
        mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
        step = trace_step(config, CONFIG, mesh).traced.jaxpr
        live, _ = partial_eval.dce_jaxpr(step.jaxpr, [True] * len(step.jaxpr.outvars))    # as XLA leaves out
        traced = count_flops(step.replace(jaxpr=live), platform="cpu")
        image = count_flops(trace_encoder(config, CONFIG).jaxpr, platform="cpu")
        return traced, PACKS * model_flops(planned, CONFIG, image.total, count_passes(config)), image
    return run


@pytest.mark.parametrize("frozen, adapted", [
    (("und",), ()), (("vit",), ()), (("gen", "embeddings"), ()), (("vit", "connector"), ()),
    ((), ("und", "gen")), ((), ("vit",)), (("vit", "connector", "embeddings"), ("und", "gen"))])
def test_what_does_not_train_is_less_work(trace, frozen, adapted):
    """As much less as a traced step has, once what nobody reads is left out of it."""
    (full, ours, _), (less, thin, _) = trace(), trace(frozen, adapted)
    shapes = dataclasses.replace(small_step(), lora=LoraConfig(adapted, rank=1)).network(CONFIG).shapes
    tokens = {"und": TEXT + VIT, "gen": LATENT, "vit": VIT}
    # Ours leaves them out, for in a large network they are nothing.
    adapters = sum(6 * PACKS * tokens[group_of(path)] * math.prod(leaf.shape)
                   for path, leaf in zip(paths_of(shapes), jax.tree.leaves(shapes)) if is_adapter(path))
    assert full.total - less.total + adapters == pytest.approx(ours - thin, rel=0.1)


def small_step():
    data = {"groups": {"initial_full": {}}, "source": "", "packs_per_step": PACKS, "text_tokens": TEXT,
            "vit_tokens": VIT, "latent_tokens": LATENT, "images": 1, "latent_patch": 4, "vit_patch": 4,
            "max_latent_size": 5, "vit_max_side": 6,
            "vae_transform": {"stride": 4, "max_size": 20, "min_size": 4},
            "vit_transform": {"stride": 4, "max_size": 24, "min_size": 4}}
    return from_config_dict(TrainConfig, {"stage": "s", "init_from": "", "total_steps": 1, "data": data,
                                          "remat": "none", "mesh": {"data": 1, "fsdp": 1}})


def test_model_flops_are_the_traced_step_without_what_is_done_twice(trace):
    """Slots all used and dense, no remat: only the scores are computed again, 2 of 14 operations a pair."""
    traced, ours, image = trace()
    llm, encoder = CONFIG.llm, CONFIG.vit
    again = 2.0 * PACKS * (llm.num_hidden_layers * llm.hidden_size * SLOTS**2
                           + CONFIG.num_vit_layers * encoder.hidden_size * VIT**2)
    heads = traced.total - again - ours   # logits computed again, and the small linears of the latent stream
    assert math.isclose(traced.conv, PACKS * image.conv, rel_tol=1e-6)
    assert 0 < heads < 0.25 * ours


def test_devices_that_share_a_pack_share_its_images():
    """Eight image slots, four devices along `context`: convolutions are those of one device."""
    data = {"source": "", "groups": {"full": {}}, "packs_per_step": 1, "text_tokens": 16, "vit_tokens": 16,
            "latent_tokens": 32, "images": 8, "latent_patch": 4, "vit_patch": 4, "max_latent_size": 5,
            "vit_max_side": 6, "vae_transform": {"stride": 4, "max_size": 20, "min_size": 4},
            "vit_transform": {"stride": 4, "max_size": 24, "min_size": 4}}
    config = from_config_dict(TrainConfig, {"stage": "s", "init_from": "", "total_steps": 1, "data": data})
    conv = [count_flops(trace_step(config, CONFIG, make_mesh(MeshConfig(fsdp=1, context=ways),
                                                             jax.devices()[:ways])).traced.jaxpr).conv
            for ways in (1, 4)]
    assert conv[0] == conv[1] > 0
