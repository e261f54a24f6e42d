"""The same seed on the same mesh: bit-identical over a hundred steps, and over a restart."""

import signal

import jax
import numpy as np
import pytest

from irg_jax.checkpoints.model import load_model
from test_distributed import launch, stage, start  # noqa: F401 (a fixture)
from test_guards import wait_for
from test_loop import base, metrics  # noqa: F401 (a fixture)

OPTIONS = (1, 2, "--config.mesh.fsdp=2", "--config.total_steps=100", "--config.save_every=1000")


@pytest.mark.slow
def test_a_hundred_steps_are_the_same_to_the_last_bit(stage, tmp_path):  # noqa: F811
    [(code, output)] = launch(stage, tmp_path / "one", *OPTIONS)
    assert code == 0, output
    [process] = start(stage, tmp_path / "two", *OPTIONS)
    log = tmp_path / "two" / "stage1" / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 40, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "stopped and saved at step" in output, output
    [(code, output)] = launch(stage, tmp_path / "two", *OPTIONS)
    assert code == 0, output
    one, two = (metrics(tmp_path / run / "stage1") for run in ("one", "two"))
    assert one == two and len(one) == 100
    one, two = (load_model(tmp_path / run / "stage1").params for run in ("one", "two"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
