"""What is told of a step, and to whom."""

import contextlib
import dataclasses
import json
import resource
import sys
import types

import numpy as np
import pytest
import tqdm
from PIL import Image

from data_pipelines.pipeline import make_iterator
from irg_jax.parallel.hosts import Hosts
from irg_jax.parallel.sharding import MeshConfig
from irg_jax.training.dry_run import measured_seconds
from irg_jax.training.goodput import Ledger
from irg_jax.training.loop import train
from irg_jax.training.metrics import EventLog, LineFile, MetricWriter, Progress
from irg_jax.training.trainer import Trainer
from test_faults import PIXELS, TOKENIZER, data_with
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


def test_a_bad_record_is_an_event_once_whoever_met_it_also_the_one_too_many(tmp_path):
    """Of five records one has no pixels, and one may be bad; another host, too, met that one, then a second."""
    trainer = object.__new__(Trainer)
    trainer.data = make_iterator(data_with(tmp_path, PIXELS, max_bad_share=0.2), TOKENIZER)
    trainer.hosts, trainer.ledger, trainer._told = Hosts(), Ledger(None), set()
    with EventLog(tmp_path) as trainer.events, contextlib.closing(trainer.data):
        for _ in range(12):
            trainer.next_batch()
        [fault] = trainer._told
        trainer.hosts._notes.put(list(fault))
        trainer.next_batch()
        trainer.hosts._notes.put(["full", "row 3 is bad"])
        with pytest.raises(ValueError, match="row 3 is bad .*more than the 1 of 5"):
            trainer.next_batch()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events] == [f"full: {fault.reason}", "full: row 3 is bad"]
    assert "row 4" in fault.reason and 0 <= events[0]["step"] < 12 and events[1]["step"] == 13


def test_records_that_were_bad_when_steps_were_planned_are_events_of_every_start(base, tmp_path):  # noqa: F811
    data = data_with(tmp_path / "data", "no conversation", packs_per_step=1, max_bad_share=0.2)
    fields = config(base, total_steps=1, mesh=MeshConfig(context=8), data=data)
    for start in range(2):
        longer = dataclasses.replace(fields, total_steps=start + 1)
        assert train(longer, tmp_path, accepted=["total_steps"]) == start + 1
    told = [json.loads(line) for line in (tmp_path / "stage1" / "events.jsonl").read_text().splitlines()]
    bad = [event for event in told if event["event"] == "bad record"]
    assert [event["step"] for event in bad] == [0, 1] and all("row 4" in event["text"] for event in bad)


def test_the_record_that_ends_a_run_is_an_event(tmp_path):
    trainer = object.__new__(Trainer)
    trainer.data = make_iterator(data_with(tmp_path, PIXELS, max_bad_share=0.0), TOKENIZER)
    trainer.hosts, trainer.ledger, trainer._told = Hosts(), Ledger(None), set()
    with EventLog(tmp_path) as trainer.events, contextlib.closing(trainer.data):
        with pytest.raises(ValueError, match="more than the 0 of 5"):
            while True:
                trainer.next_batch()
    [event] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert "row 4" in json.loads(event)["text"]


def run_steps(log, ledger, steps, *, save_at=None):
    """A life of the run: a line for every step of `steps`, of a second each; returns what was saved with it."""
    saved = {}
    with log.open("a") as file:
        for step in steps:
            if step == save_at:
                saved = ledger.state()
            print(json.dumps({"step": step, "time": 0, "step_seconds": 1}), file=file, flush=True)
    return saved


def test_what_a_kill_undid_is_lost_once(tmp_path):
    log, first, second, third = tmp_path / "metrics.jsonl", Ledger(None), Ledger(None), Ledger(None)
    first.resume({}, log, 0)
    saved = run_steps(log, first, range(6), save_at=2)     # 2 to 5 are undone
    second.resume(saved, log, 2)
    assert second.state()["seconds"]["lost"] == 4
    third.resume(saved, log, 2)                            # a life that was killed before its first line
    assert third.state()["seconds"]["lost"] == 4
    saved = run_steps(log, second, range(2, 5), save_at=4)     # before the last one undone; 4 is undone again
    last = Ledger(None)
    last.resume(saved, log, 4)
    assert last.state()["seconds"]["lost"] == 5


def test_steps_without_a_line_are_lost_too(tmp_path):
    log, first, second, third = tmp_path / "metrics.jsonl", Ledger(None), Ledger(None), Ledger(None)
    first.resume({}, log, 0)
    saved = run_steps(log, first, range(0, 41, 10), save_at=10)    # log_every of 10, and saved at 5
    second.resume(saved, log, 5)
    assert second.state()["seconds"]["lost"] == 36    # 5 to 40
    run_steps(log, second, range(10, 21, 10))         # 5 to 20, in another life
    third.resume(saved, log, 5)
    assert third.state()["seconds"]["lost"] == 36 + 16


SOUND = b'{"step": 3, "time": 1, "step_seconds": 2}\n'


@pytest.mark.parametrize("line", [
    b"\xff", b"{", b"[]", b"null", b"3", b"[" * 100_000, b'{"step": 3}', SOUND.replace(b"3", b"null", 1),
    SOUND.replace(b"3", b"true", 1), SOUND.replace(b"3", b"3.5", 1), SOUND.replace(b"2", b'"2"'),
    SOUND.replace(b"2", b"NaN"), SOUND.replace(b"2", b"-1"), SOUND.replace(b"3", b"1" * 400, 1), SOUND[:-5]])
def test_lines_that_are_not_ours_stop_no_resume_and_no_dry_run(tmp_path, line):
    log, ledger = tmp_path / "metrics.jsonl", Ledger(None)
    log.write_bytes(SOUND * 3 + line + b"\n" + SOUND)
    ledger.resume({}, log, 3)
    assert ledger.state()["seconds"]["lost"] == 8 and measured_seconds(tmp_path) == 2


def test_too_many_skipped_steps_say_what_checkpoints_hold(base):  # noqa: F811
    """One may have been saved among them."""
    progress = Progress(tqdm.tqdm(disable=True), None, EventLog(None), config=config(base, max_skipped=2),
                        records=lambda step: ["full 3"], ledger=Ledger(None), peak_share=None)
    progress.tell(6, STEP | {"finite": False}, {})
    with pytest.raises(FloatingPointError, match="at step 7; it held full 3.*before step 6, also in"):
        progress.tell(7, STEP | {"finite": False}, {})


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
