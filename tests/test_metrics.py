"""What is told of a step, and to whom."""

import json
import resource
import sys
import types

import numpy as np
import pytest
import tqdm
from PIL import Image

from irg_jax.training.goodput import Ledger
from irg_jax.training.metrics import EventLog, LineFile, MetricWriter, Progress
from test_loop import base, config  # noqa: F401 (a fixture)

STEP = {"loss": 2.0, "ce": 1.0, "mse": 1.0, "grad_norm": 0.5, "tokens": 100, "finite": True, "ce/full": np.nan,
        "ce/improving": 1.0}


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for Weights & Biases that keeps what it is told."""
    told = []
    run = types.SimpleNamespace(log=lambda values, step: told.append((step, values)),
                                finish=lambda: told.append("finished"))
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.init = lambda **fields: told.append(fields) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def tell(folder, config, steps, **fields):  # noqa: F811
    writer = MetricWriter(folder, config, first_step=0)
    progress = Progress(tqdm.tqdm(disable=True), writer, EventLog(folder), config=config,
                        records=lambda step: [], ledger=Ledger(folder / "goodput.json"), **fields)
    for step in steps:
        progress.tell_previous(step, STEP, {"bad_records": 0})
    with progress.paused():
        progress.show(3, Image.new("RGB", (8, 8)))
    writer.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_told_once_the_next_has_begun(base, tmp_path):  # noqa: F811
    lines = tell(tmp_path, config(base), range(4), peak_share=1e-9)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all("ce/full" not in line and line["ce/improving"] == 1.0 and 0 < line["mfu"] < 1 for line in lines)


def test_weights_and_biases_are_told_by_option_offline_first(base, tmp_path, wandb):  # noqa: F811
    lines = tell(tmp_path / "run" / "stage1", config(base, wandb="offline"), range(2), peak_share=None)
    begun, *steps, ended = wandb
    assert begun["mode"] == "offline" and begun["name"] == "run/stage1" and begun["resume"] == "allow"
    assert begun["config"]["total_steps"] == 5 and ended == "finished"
    for (step, values), line in zip(steps, lines, strict=True):
        assert {"step": step, "time": line["time"]} | values == line


def test_weights_and_biases_that_are_not_there_are_asked_for(base):  # noqa: F811
    with pytest.raises(ValueError, match="pip install wandb"):
        config(base, wandb="online")


def test_a_full_disk_tears_no_line(tmp_path):
    """A limit on the size of files stands for the disk: like that, it takes a part of the line first."""
    file, line = LineFile(tmp_path / "metrics.jsonl"), {"step": 1, "text": "x" * 100}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.write(line)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            file.write(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.write(line)
    file.close()
    assert [json.loads(each) for each in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [line, line]
