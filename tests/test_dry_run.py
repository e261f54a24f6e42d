"""`--dry_run`: what it promises is what a run, the compiler and the planner say; and no device is touched."""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from data_pipelines.config import from_config_dict, load_config
from data_pipelines.simulation import RECORDS
from irg_jax.config import BAGEL_7B_MOT, TrainConfig
from irg_jax.parallel.sharding import MeshConfig, make_abstract_mesh, make_mesh
from irg_jax.parallel.topologies import find_topology
from irg_jax.training import dry_run
from test_loop import base, config  # noqa: F401 (a fixture)

ROOT = pathlib.Path(__file__).parent.parent


def stage1() -> TrainConfig:
    return from_config_dict(TrainConfig, load_config(str(ROOT / "configs" / "irgl_stage1.py")))


def number(page: str, pattern: str) -> float:
    found = re.search(pattern, page)
    assert found, (pattern, page[-3000:])
    return float(found[1].replace(",", ""))


@pytest.fixture(scope="module")
def full_size() -> str:
    topology = find_topology("v5p-128")
    return dry_run.describe(stage1().on(topology), None, topology=topology, mfu=0.5)


def test_the_full_size_on_a_slice(full_size):
    assert "config.optimizer.learning_rate = 2e-05" in full_size
    assert "config.data.packs_per_step = 64" in full_size     # as the table has it for this slice
    assert "mesh: data 4, fsdp 16, tensor 1, context 1 on 64 chips of v5p-128" in full_size
    assert "model: base is no checkpoint yet; BAGEL-7B-MoT is assumed" in full_size
    assert number(full_size, r"parameters: ([\d.]+) B") == pytest.approx(14.6, abs=0.1)
    # float32: parameters, two moments, EMA and gradients, over 16 chips each.
    for name, copies in (("parameters", 1), ("moments", 2), ("EMA", 1), ("gradients", 1)):
        share = number(full_size, r"parameters: ([\d.]+) B") * 1e9 * 4 * copies / 16 / 2**30
        assert number(full_size, name + r" ([\d.]+),") == pytest.approx(share, rel=0.02)
    assert "of 95.74 GiB" in full_size and "does not fit" not in full_size
    assert number(full_size, r"a step: (\d+) packs") == 64
    assert number(full_size, r"parts; ([\d,]+) slots") == 64 * (3456 + 19712 + 24704)
    # 1.85 PFLOP for the original's pack of 40,000 tokens; attention grows faster than tokens. At half the peak.
    work = number(full_size, r"work: ([\d.]+) PFLOP a step")
    tokens = number(full_size, r"slots, ([\d,]+) tokens")
    assert work == pytest.approx(1.85 * tokens / 40_000, rel=0.15)
    seconds = work * 1e15 / (64 * 459e12 * 0.5)
    assert number(full_size, r"steps of ([\d.]+) s") == pytest.approx(seconds, abs=0.01)
    assert number(full_size, r"time: ([\d.]+) hours") == pytest.approx(2000 * seconds / 3600, abs=0.06)


def test_epochs_count_records(full_size):
    lines = re.findall(r"(\w+): ([\d,]+) records, ([\d.]+) a step, ([\d,]+) steps an epoch, ([\d.]+) epochs",
                       full_size)
    assert len(lines) == 6
    for _, records, taken, epoch, epochs in lines:
        assert int(records.replace(",", "")) == RECORDS
        assert int(epoch.replace(",", "")) == pytest.approx(RECORDS / float(taken), rel=0.01)
        assert float(epochs) == pytest.approx(2000 * float(taken) / RECORDS, abs=0.02)


def test_a_slice_too_small_is_told():
    assert "this does not fit" in dry_run.describe(stage1(), None, topology=find_topology("v5e-8"))


def test_a_real_checkpoint_and_real_records_count(base):  # noqa: F811
    page = dry_run.describe(config(base, mesh=MeshConfig()), None)
    assert "assumed" not in page and "simulated" not in page
    assert number(page, r"    full: ([\d,]+) records") == number(page, r"    improving: ([\d,]+) records") == 12
    assert "time: unknown without --topology or steps already run" in page
    assert [dry_run.operations(count) for count in (0.0, 999.0, 1.5e9, 2e21)] == [
        "0 FLOP", "999 FLOP", "1.5 GFLOP", "2,000 EFLOP"]
    assert number(page, r"parameters: ([\d.]+) B") < 0.01


def test_a_stage_of_a_job_has_the_geometry_that_the_first_starts_from(base, tmp_path):  # noqa: F811
    first = config(base, mesh=MeshConfig())
    second = dataclasses.replace(first, stage="stage2", init_from="stage1:ema")
    assert "assumed" not in dry_run.describe(second, tmp_path, earlier=[first])
    with pytest.raises(ValueError, match="stage1:ema is no checkpoint yet, and BAGEL-7B-MoT, taken for it"):
        dry_run.describe(second, tmp_path)


def test_steps_that_were_run_count(base, tmp_path):  # noqa: F811
    (tmp_path / "stage1").mkdir()
    lines = [json.dumps({"step": step, "time": 0, "step_seconds": 3.0 if step else 99.0}) for step in range(9)]
    (tmp_path / "stage1" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = dry_run.describe(config(base, mesh=MeshConfig(), total_steps=2400), tmp_path)
    assert f"time: 2.0 hours for 2,400 steps of 3.00 s, as measured in {tmp_path}/stage1" in page


def test_what_a_run_would_refuse_is_refused(base):  # noqa: F811
    with pytest.raises(ValueError, match="needs 2 devices, there are 1"):
        dry_run.describe(config(base, mesh=MeshConfig(fsdp=2)), None)
    with pytest.raises(ValueError, match="must be a multiple of mesh.data"):
        dry_run.describe(config(base, mesh=MeshConfig(fsdp=3)), None, devices=3)


@pytest.mark.parametrize("axes, sizes", [
    (dict(fsdp=-1), (1, 8, 1, 1)), (dict(data=2, fsdp=2, context=2), (2, 2, 1, 2))])
def test_a_mesh_without_devices_is_that_of_devices(axes, sizes):
    mesh = make_abstract_mesh(MeshConfig(**axes), 8)
    assert tuple(mesh.shape.values()) == sizes == tuple(make_mesh(MeshConfig(**axes)).shape.values())
    with pytest.raises(ValueError, match="multiple of the 3 slices"):
        make_abstract_mesh(MeshConfig(data=2, fsdp=4), 8, slices=3)


def test_the_command_touches_no_device_and_writes_nothing(base, tmp_path):  # noqa: F811
    """Platforms that are not there: any use of a device but the CPU would fail."""
    line = [sys.executable, "-m", "irg_jax.train", "--config=configs/irgl_stage1.py", "--dry_run",
            "--topology=2xv5p-128", f"--workdir={tmp_path / 'run'}", "--config.data.seed=7"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"JAX_PLATFORMS": "tpu", "XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    assert "config.data.seed = 7" in done.stdout and "128 chips of 2xv5p-128" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_layers_are_counted_once():
    mesh = make_abstract_mesh(MeshConfig(fsdp=4, context=2), 8)
    size = dry_run.saved_inputs(stage1(), BAGEL_7B_MOT, mesh)
    slots = 3456 + 19712 + 24704
    assert size == 2 * (slots * 3584 * 28 + 19712 * 1152 * 26) * 2 // 2
    assert math.prod(mesh.shape.values()) == 8 and jax.device_count() == 8
