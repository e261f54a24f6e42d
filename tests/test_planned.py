"""What planned packs hold, against the visibility rule itself, and the work in them against a traced step."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from benchmarks.train_step import official_flops
from checkpoint_cases import CONFIG
from data_pipelines.batch import Rows, visible
from data_pipelines.config import DataConfig, ImageTransform, from_config_dict, load_config
from data_pipelines.planning import Planner
from data_pipelines.simulation import simulate
from irg_jax.config import TrainConfig
from irg_jax.models.config import LLMConfig
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.training.abstract import trace_encoder, trace_step
from irg_jax.training.planned import (
    Planned,
    count_pairs,
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


def test_model_flops_are_the_traced_step_without_what_is_done_twice():
    """Slots all used and dense, no remat: only the scores are computed again, 2 of 14 operations a pair."""
    text, vit, latent, packs = 64, 36, 25, 2
    data = {"groups": {"initial_full": {}}, "source": "", "packs_per_step": packs, "text_tokens": text,
            "vit_tokens": vit, "latent_tokens": latent, "images": 1, "latent_patch": 4, "vit_patch": 4,
            "max_latent_size": 5, "vit_max_side": 6,
            "vae_transform": {"stride": 4, "max_size": 20, "min_size": 4},
            "vit_transform": {"stride": 4, "max_size": 24, "min_size": 4}}
    config = from_config_dict(TrainConfig, {"stage": "s", "init_from": "", "total_steps": 1, "data": data,
                                            "remat": "none", "mesh": {"data": 1, "fsdp": 1}})
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    traced = count_flops(trace_step(config, CONFIG, mesh).traced.jaxpr, platform="cpu")
    image = count_flops(trace_encoder(config, CONFIG).jaxpr, platform="cpu")
    slots = text + vit + latent
    planned = Planned(text, vit, latent, 1.0, slots**2, vit**2, 1.0, 1.0)
    ours = packs * model_flops(planned, CONFIG, image.total)
    llm, encoder = CONFIG.llm, CONFIG.vit
    again = 2.0 * packs * (llm.num_hidden_layers * llm.hidden_size * slots**2
                           + CONFIG.num_vit_layers * encoder.hidden_size * vit**2)
    heads = traced.total - again - ours   # logits computed again, and the small linears of the latent stream
    assert math.isclose(traced.conv, packs * image.conv, rel_tol=1e-6)
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
