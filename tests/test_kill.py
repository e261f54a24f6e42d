"""A run killed at twenty random moments, in steps, saves and starts, ends as one that was left alone."""

import json
import random
import time

import jax
import numpy as np
import pytest

from irg_jax.checkpoints.bundle import latest_step
from irg_jax.checkpoints.model import load_model
from test_distributed import launch, stage, start  # noqa: F401 (a fixture)
from test_loop import base, metrics  # noqa: F401 (a fixture)

STEPS, KILLS = 80, 20


def lines(workdir) -> int:
    path = workdir / "stage1" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing(stage, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))   # each start compiles the same
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    options = (1, 1, f"--config.total_steps={STEPS}", "--config.save_every=1")
    [(code, output)] = launch(stage, tmp_path / "alone", *options)
    assert code == 0, output
    rng, killed, reached = random.Random(0), tmp_path / "killed", []
    for number in range(KILLS):
        before, [process] = lines(killed), start(stage, killed, *options)
        if number % 5:    # some steps in; as every step is saved, often in a save
            while lines(killed) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
        else:
            time.sleep(rng.uniform(0, 8))
        if process.poll() is not None:    # it came to its end
            assert process.returncode == 0, process.communicate()[0]
        process.kill()
        process.communicate()
        reached.append(latest_step(killed / "stage1"))
    assert reached == sorted(reached) and len(set(reached)) > KILLS // 3, reached
    [(code, output)] = launch(stage, killed, *options)
    assert code == 0, output
    assert metrics(killed / "stage1") == metrics(tmp_path / "alone" / "stage1")
    one, other = (load_model(folder / "stage1").params for folder in (killed, tmp_path / "alone"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    log = (killed / "stage1" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in log)    # no line is torn
