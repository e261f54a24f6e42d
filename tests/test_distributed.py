"""Training by several processes on this machine: the same numbers, one log, one checkpoint, plain refusals."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet
import pytest

from data_cases import write_rows
from irg_jax.checkpoints.bundle import latest_step
from irg_jax.checkpoints.model import load_model
from test_hosts import free_port
from test_loop import base, metrics  # noqa: F401 (a fixture)

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 3
SLICES = (str(ROOT / "tests" / "two_slices.py"),)
# The stage of test_loop as a file, for commands.
CONFIG = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({{
        "stage": "stage1", "init_from": {base!r} + "/base", "total_steps": {steps}, "save_every": 2,
        "dtype": "float32", "remat": "none", "loss": {{"vae_batch": 4}},
        "optimizer": {{"learning_rate": 1e-3, "eps": 1e-4}},
        "data": {{
            "source": {base!r} + "/data",
            "groups": {{"full": {{"weight": 1.0, "is_mandatory": True}}, "improving": {{"weight": 1.0}}}},
            "packs_per_step": 4, "text_tokens": 160, "vit_tokens": 48, "latent_tokens": 48, "images": 6,
            "max_latent_size": 8, "vit_max_side": 8, "vae_dropout": 0.0,
            "vae_transform": {{"stride": 16, "max_size": 64, "min_size": 16}},
            "vit_transform": {{"stride": 14, "max_size": 56, "min_size": 14}},
        }}}})
"""


@pytest.fixture(scope="module")
def stage(base):  # noqa: F811
    path = base / "stage.py"
    path.write_text(CONFIG.format(base=str(base), steps=STEPS))
    return path


def start(stage, workdir, processes: int, devices: int, *arguments: str, script=("-m", "irg_jax.train"),
          odd=None) -> list[subprocess.Popen]:
    """The processes of a run. Args: odd is (index of a process, its further arguments, its folder)."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600 "
        # Every process compiles the step: quickly, on a machine of two cores.
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    port, running = free_port(), []
    for index in range(processes):
        place = [f"--coordinator_address=localhost:{port}", f"--num_processes={processes}",
                 f"--process_id={index}"] if processes > 1 else []
        added, folder = odd[1:] if odd and odd[0] == index else ([], stage.parent)
        running.append(subprocess.Popen(
            [sys.executable, *script, f"--config={stage}", f"--workdir={workdir}", *place, *arguments, *added],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True))
    return running


def launch(*arguments, **options) -> list[tuple[int, str]]:
    """(exit status, output) of every process, once all have ended."""
    outputs = [(process, process.communicate(timeout=400)[0]) for process in start(*arguments, **options)]
    return [(process.returncode, output) for process, output in outputs]


def mesh(**axes: int) -> list[str]:
    return [f"--config.mesh.{axis}={size}" for axis, size in ({"fsdp": 1} | axes).items()]


@pytest.fixture(scope="module")
def alone(stage, tmp_path_factory):
    """Losses and EMA of 1 x 8: one process with all devices."""
    workdir = tmp_path_factory.mktemp("alone")
    [(code, output)] = launch(stage, workdir, 1, 8, *mesh(data=2, fsdp=2, tensor=2))
    assert code == 0, output
    return metrics(workdir / "stage1"), load_model(workdir / "stage1").params


def assert_same(alone, workdir) -> None:
    losses, ema = alone
    found = metrics(workdir / "stage1")
    assert sorted(found) == sorted(losses)
    np.testing.assert_allclose([found[step] for step in losses], list(losses.values()), rtol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), ema,
                 load_model(workdir / "stage1").params)


# In 4 x 2 with context 4, two processes share each pack; with tensor 2 and context 2 a pack lies in one.
@pytest.mark.parametrize("processes, devices, axes", [
    (2, 4, dict(data=2, fsdp=2, context=2)),
    pytest.param(4, 2, dict(fsdp=2, context=4), marks=pytest.mark.slow),
    pytest.param(1, 1, {}, marks=pytest.mark.slow),
    pytest.param(2, 4, dict(fsdp=2, tensor=2, context=2), marks=pytest.mark.slow),
    pytest.param(4, 2, dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    pytest.param(8, 1, dict(fsdp=4, context=2), marks=pytest.mark.slow)])
def test_any_processes_train_alike(stage, alone, tmp_path, processes, devices, axes):
    done = launch(stage, tmp_path, processes, devices, *mesh(**axes))
    assert all(code == 0 for code, _ in done), done
    assert_same(alone, tmp_path)
    lines = (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]        # one log
    assert sorted(path.name for path in (tmp_path / "stage1" / "checkpoints").iterdir()
                  if path.name.isdecimal()) == ["2", "3"]                    # one checkpoint
    assert all("step/s" not in output and "s/step" not in output for _, output in done[1:])


@pytest.mark.slow
def test_fewer_devices_with_accumulation_train_alike(stage, alone, tmp_path):
    [(code, output)] = launch(stage, tmp_path, 1, 2, *mesh(fsdp=2), "--config.accumulate=2")
    assert code == 0, output
    assert_same(alone, tmp_path)


@pytest.mark.slow
def test_two_slices_train_alike_and_another_topology_resumes(stage, alone, tmp_path):
    done = launch(stage, tmp_path, 2, 2, *mesh(data=2, tensor=2), script=SLICES)
    assert all(code == 0 for code, _ in done), done
    assert_same(alone, tmp_path)
    # As if it had been killed after the checkpoint before the last; then one process goes on.
    subprocess.run(["rm", "-r", str(tmp_path / "stage1" / "checkpoints" / "3")], check=True)
    [(code, output)] = launch(stage, tmp_path, 1, 2, *mesh(fsdp=2))
    assert code == 0, output
    assert_same(alone, tmp_path)


def test_slices_that_do_not_fit_the_mesh_are_refused(stage, tmp_path):
    done = launch(stage, tmp_path, 2, 1, *mesh(fsdp=2), script=SLICES)
    assert all(code == 1 and "multiple of the 2 slices" in output for code, output in done), done


@pytest.mark.slow
def test_bad_records_of_all_hosts_are_counted_and_limited_by_the_first(stage, tmp_path):
    """Four of twelve records have no pixels; hosts read packs of their own, and the limit is one for all."""
    source = tmp_path / "data"
    shutil.copytree(stage.parent / "data", source)
    for file in sorted((source / "train" / "full").glob("*.parquet")):
        rows = pyarrow.parquet.read_table(file)["conversation"].to_pylist()
        write_rows(file, [row if index % 3 else spoil(row) for index, row in enumerate(rows)])
    line = (*mesh(fsdp=2), f"--config.data.source={source}")
    alone = launch(stage, tmp_path / "alone", 1, 2, *line, "--config.data.max_bad_share=0.5")
    done = launch(stage, tmp_path / "both", 2, 1, *line, "--config.data.max_bad_share=0.5")
    assert all(code == 0 for code, _ in alone + done), (alone, done)
    assert bad_images(tmp_path / "both") == bad_images(tmp_path / "alone") == 4
    done = launch(stage, tmp_path / "few", 2, 1, *line, "--config.data.max_bad_share=0.25")
    assert all(code == 1 and "more than the 3 of 12" in output for code, output in done), done


def spoil(row: str) -> str:
    """The same record, its first image cut short."""
    record = json.loads(row)
    part = next(part for turn in record if isinstance(turn["content"], list)
                for part in turn["content"] if part["type"] == "image")
    part["content"] = part["content"][:len(part["content"]) // 8 * 4]
    return json.dumps(record)


def bad_images(workdir) -> int:
    """As the last line of the log counts them."""
    return json.loads((workdir / "stage1" / "metrics.jsonl").read_text().splitlines()[-1])["bad_image"]


# ---- what ends a start -----------------------------------------------------------------------------

def test_a_host_with_another_config_is_named(stage, tmp_path):
    done = launch(stage, tmp_path, 3, 1, *mesh(fsdp=3),
                  odd=(1, ["--config.optimizer.learning_rate=5"], stage.parent))
    for code, output in done:
        assert code == 1 and "Traceback" not in output
        assert "hosts disagree: host 1 (" in output and "config.optimizer.learning_rate 5" in output


def test_what_fails_on_one_host_ends_all_with_its_sentence(stage, tmp_path):
    """The second process stands in a folder where the relative path leads nowhere."""
    done = launch(stage, tmp_path, 2, 1, *mesh(fsdp=2), "--config.init_from=base", odd=(1, [], tmp_path))
    for code, output in done:
        assert code == 1 and "Traceback" not in output
        assert "host 1 (" in output and "is no model checkpoint" in output


def test_a_host_with_other_data_is_named(stage, tmp_path):
    """The second process stands where the same relative paths lead to one record fewer."""
    shutil.copytree(stage.parent / "base", tmp_path / "base")
    shutil.copytree(stage.parent / "data", tmp_path / "data")
    file = min((tmp_path / "data" / "train" / "full").glob("*.parquet"))
    write_rows(file, pyarrow.parquet.read_table(file)["conversation"].to_pylist()[1:])
    done = launch(stage, tmp_path / "run", 2, 1, *mesh(fsdp=2), "--config.init_from=base",
                  "--config.data.source=data", odd=(1, [], tmp_path))
    for code, output in done:
        assert code == 1 and "Traceback" not in output
        assert "hosts disagree: host 1 (" in output and "has data " in output


def test_a_host_that_never_comes_ends_the_start(stage, tmp_path):
    port = free_port()
    done = launch(stage, tmp_path, 1, 1, f"--coordinator_address=localhost:{port}", "--num_processes=2",
                  "--process_id=0", "--start_timeout=2")
    assert done[0][0] == 1 and "host 1 did not come within 2 s; these did: 0 (" in done[0][1]


# ---- what ends a run -------------------------------------------------------------------------------

def await_steps(workdir, count: int, running) -> None:
    """Until so many steps are in the log."""
    path, deadline = workdir / "stage1" / "metrics.jsonl", time.monotonic() + 200
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < deadline and all(each.poll() is None for each in running)
        time.sleep(0.1)


@pytest.mark.parametrize("dying", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_host_that_dies_ends_the_others_at_once_with_its_name(stage, tmp_path, dying):
    running = start(stage, tmp_path, 2, 1, *mesh(fsdp=2), "--config.total_steps=99999",
                    "--config.save_every=99999")
    await_steps(tmp_path, 2, running)
    running[dying].kill()
    begun = time.monotonic()
    output = running[1 - dying].communicate(timeout=60)[0]
    assert time.monotonic() - begun < 15
    assert running[1 - dying].returncode == 1 and f"error: host {dying} (" in output.splitlines()[-1], output


@pytest.mark.slow
def test_a_signal_to_one_host_saves_one_step_on_all_and_the_run_resumes(stage, tmp_path):
    line = (stage, tmp_path, 2, 1, *mesh(fsdp=2), "--config.save_every=100000")
    running = start(*line, "--config.total_steps=100000")
    await_steps(tmp_path, 2, running)
    told = len(metrics(tmp_path / "stage1"))
    running[1].terminate()
    outputs = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    saved = latest_step(tmp_path / "stage1")
    assert f"stopped and saved at step {saved}" in outputs[0] and "stopped" not in outputs[1]
    assert sorted(metrics(tmp_path / "stage1")) == list(range(saved)) and saved >= told
    done = launch(*line, f"--config.total_steps={saved + 1}", "--accept_changes=total_steps")
    assert all(code == 0 for code, _ in done), done
    assert sorted(metrics(tmp_path / "stage1")) == list(range(saved + 1))
