"""The report on a compiled step: what fits, what to change, and the command itself for a slice nobody has."""

import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from data_pipelines.config import from_config_dict, load_config
from irg_jax.checkpoints.names import model_shapes
from irg_jax.config import TrainConfig
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.parallel.collectives import Collective, Work
from irg_jax.parallel.compiling import Report, read_memory, rounded
from irg_jax.parallel.sharding import MeshConfig, make_abstract_mesh
from irg_jax.parallel.topologies import CHIPS
from irg_jax.training import estimate
from irg_jax.training.estimate import advise

ROOT = pathlib.Path(__file__).parent.parent
MEMORY = """Memory Space: default (color=0)
Total bytes: 253278603872 (235.88GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   60.08GiB( 10%);   60.08GiB;            0;              185; bf16[1,19712,3584], pred[94,1,4,7,512,47872]
  115.87GiB( 19%);   55.79GiB;  64511541248;               20; f32[4,3584,47872]
  The rest 1740 values are less than 5% of the total size and not shown.
"""


def test_the_compilers_memory_report_is_read():
    size, largest = read_memory(MEMORY)
    assert size == 253278603872
    assert largest == ("60.08GiB: bf16[1,19712,3584], pred[94,1,4,7,512,47872]", "55.79GiB: f32[4,3584,47872]")
    first, total, *rows = MEMORY.splitlines()
    # Of a program that fits, each argument has a block of its own.
    assert read_memory("\n".join([first, total, *rows[:3], "", *rows]))[1] == largest
    with pytest.raises(ValueError, match="cannot be read"):
        read_memory("something else")


def test_the_roofline_takes_each_limit_by_itself():
    chip = CHIPS["v5p"]
    report = Report(1.0, True, 0, 0, 0, 0, (), (Collective("all-gather", 10.0, 4, 5.4e9, False),),
                    Work(flops=459e12, hbm_bytes=2 * 2.46e12))
    roofline = report.roofline(chip, kernel_flops=459e12)
    assert roofline == {"compute": 2.0, "hbm": 2.0, "network": pytest.approx(0.1)}


def result(**changes):
    fit = {"mesh": {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}, "packs_per_step": 8, "accumulate": 1,
           "fits": True, "peak_hbm_gib": 50.0, "hbm_gib": 95.74, "state_gib": 27.0, "temp_gib": 20.0,
           "replication": 1.0, "largest_temporaries": ["4GiB: f32[1]"]}
    return fit | changes


@pytest.mark.parametrize("changes, words", [
    ({"fits": False, "peak_hbm_gib": 100.0, "state_gib": 80.0}, ["lacks 4.3 GiB", "more ways"]),
    ({"peak_hbm_gib": 100.0, "planned_hbm_gib": 90.0}, ["plan has 90.0 GiB"]),
    ({"fits": False, "peak_hbm_gib": 100.0, "mesh": {"data": 1, "fsdp": 2}}, ["lacks", "accumulate 4"]),
    ({"fits": False, "peak_hbm_gib": 100.0}, ["lacks", "smaller budgets"]),
    ({"replication": 8.0}, ["8.00 times over"]),
    ({"replication": 8.0, "mesh": {"data": 1, "fsdp": 8, "tensor": 1, "context": 8}}, ["over: mesh.context"]),
    ({"packs_per_step": 64, "mesh": {"data": 4, "fsdp": 16}}, ["fill the 64 shards"])])
def test_advice_names_what_to_change(changes, words):
    lines = advise(result(**changes))
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines))


def test_nothing_is_said_of_what_is_well():
    assert advise(result()) == []


def test_rounding_keeps_the_form():
    assert rounded({"a": [1.23456789, 2], "b": "x", "c": True}) == {"a": [1.235, 2], "b": "x", "c": True}


def precompile(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(pathlib.Path(sys.prefix) / "libtpu")
    return subprocess.run([sys.executable, "-m", "irg_jax.precompile", *arguments], cwd=ROOT, text=True,
                          capture_output=True, env=environment)


def report(*arguments: str) -> dict[str, Any]:
    ended = precompile("--config", "configs/irgl_stage1.py", *arguments)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout[ended.stdout.index("{"):])


def test_a_wrong_topology_is_one_sentence():
    ended = precompile("--config", "configs/irgl_stage1.py", "--topology", "v5p-129")
    assert ended.returncode == 1 and "did you mean" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_stage_1_fits_64_v5p_chips(libtpu):
    found = report("--topology", "v5p:4x4x4")
    assert found["chips"] == 64 and found["fits"] and found["params"] > 14.5e9
    assert found["peak_hbm_gib"] < found["hbm_gib"] and 0.95 < found["replication"] < 1.1
    assert found["executed_flops"] > found["model_flops"] > 0 and 0 < found["mfu_bound"] < 1
    assert found["executed_by"]["kernel"] > 0
    assert set(found["collective_gib"]) >= {"all-gather", "reduce-scatter"}


SMALL = ModelConfig(LLMConfig(1024, 512, 1024, 2, 4, 2), ViTConfig(128, 256, 2, 2), VAEConfig(
    ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1))


def test_options_are_told_by_what_a_chip_carries():
    config = from_config_dict(TrainConfig, load_config(str(ROOT / "configs/irgl_stage1.py")))
    mesh = make_abstract_mesh(MeshConfig(fsdp=4), 4)
    table = estimate.compare_options(config, SMALL, mesh)
    full, thin = table["as configured"], table["LoRA of und, gen in bfloat16"]
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(model_shapes(SMALL)))
    assert full["params"] == pytest.approx(4 * params / 4 / 2**30, rel=0.01)    # small ones are not split
    assert full["moments"] == pytest.approx(2 * full["params"], rel=1e-3)
    assert full["gradients"] == full["ema"] == full["params"]
    assert table["moments bfloat16"]["moments"] == pytest.approx(full["moments"] / 2, rel=1e-3)
    assert full["moments"] / 4 < table["moments int8"]["moments"] < 0.27 * full["moments"]
    assert table["LoRA of und, gen"]["params"] > full["params"]
    assert thin["params"] == pytest.approx(full["params"] / 2 + thin["ema"], rel=1e-3)
    assert thin["gradients"] == thin["ema"] == pytest.approx(thin["moments"] / 2, rel=1e-3)
    assert thin["ema"] < 0.15 * full["ema"]
    far = table["moments, EMA on the host"]
    assert far["on_host"] == pytest.approx(full["moments"] + full["ema"], rel=1e-3)
    assert far["all"] == pytest.approx(full["params"] + full["gradients"], rel=1e-3)
    assert all(row["on_host"] == 0 for row in table.values() if row is not far)
    parts = ("params", "gradients", "moments", "ema")
    assert all(row["all"] == pytest.approx(sum(row[part] for part in parts)) for row in table.values())
    lines = estimate.tabulate(table).splitlines()
    assert len(lines) == 1 + len(table) and len({len(line) for line in lines}) == 1


def test_a_program_that_is_refused_is_reported_all_the_same(libtpu):
    ended = precompile("--config", "configs/irgl_stage1.py", "--topology", "v6e:1x1", "--program", "write",
                       "--mesh", "fsdp=1", "--context", "98304")
    assert ended.returncode == 1, ended.stderr[-2000:]
    found = json.loads(ended.stdout[ended.stdout.index("{"):])
    assert not found["fits"] and found["hbm_gib"] < found["peak_hbm_gib"] < 36    # weights are counted once
    assert "tensor=2" in found["advice"][1] and "--context" in found["advice"][2]
    assert found["peak_hbm_gib"] == pytest.approx(found["state_gib"] + found["temp_gib"], rel=0.01)


def test_a_token_of_text_reads_its_weights_once(libtpu):
    """One expert, the head, and the cache: with layers scanned, too, nothing is copied."""
    found = report("--topology", "v6e:1x1", "--program", "write", "--mesh", "fsdp=1")
    layer = 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)
    once = 2 * (28 * (layer + 2 * 512 * 10240) + 3584 * 152064)
    assert found["fits"] and found["texts"] == 1
    assert once / 1.64e12 < found["roofline_seconds"]["hbm"] < 1.02 * once / 1.64e12


@pytest.mark.slow
def test_drawing_fits_one_v6e_chip(libtpu):
    found = report("--topology", "v6e:1x1", "--program", "generate", "--mesh", "fsdp=1")
    assert found["chips"] == found["images"] == 1 and found["fits"] and not found["collective_gib"]
    assert 27 < found["state_gib"] < found["peak_hbm_gib"] < 30    # 14.6 B in bfloat16, contexts not copied
