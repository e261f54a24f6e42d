"""A second trainer, a hang, a full disk, another config: each ends in a sentence, and nothing is lost."""

import dataclasses
import json
import os
import resource
import signal
import time

import pytest

from irg_jax.checkpoints.bundle import latest_step
from irg_jax.models.lora import LoraConfig
from irg_jax.training.guards import claim
from irg_jax.training.loop import train
from irg_jax.training.resuming import check_changes, write_config
from irg_jax.training.trainer import Trainer, check_finished
from test_distributed import launch, stage, start  # noqa: F401 (a fixture)
from test_loop import base, config, metrics  # noqa: F401 (a fixture)

LIMIT = 64 * 1024    # bytes a file of a full disk: logs fit, a checkpoint does not


def wait_for(condition, process, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.05)


def test_a_folder_is_kept_for_one(tmp_path):
    with claim(tmp_path / "stage"):
        with pytest.raises(ValueError, match=f"is being trained by process {os.getpid()} on "):
            with claim(tmp_path / "stage"):
                pass
    with claim(tmp_path / "stage"):
        pass


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_goes_on(stage, tmp_path):  # noqa: F811
    [first] = start(stage, tmp_path, 1, 1, "--config.total_steps=200", "--config.save_every=1000")
    log = tmp_path / "stage1" / "metrics.jsonl"
    wait_for(log.exists, first)
    [(code, output)] = launch(stage, tmp_path, 1, 1)
    assert code == 1 and f"is being trained by process {first.pid} on" in output and "Traceback" not in output
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=240)[0]
    assert first.returncode == 0 and "stopped and saved at step" in output, output
    steps = len(metrics(tmp_path / "stage1"))
    assert abs(latest_step(tmp_path / "stage1") - steps) <= 1
    events = [json.loads(line) for line in (tmp_path / "stage1" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "signal"]


def test_a_hang_ends_with_the_stacks_of_all_threads(stage, tmp_path):  # noqa: F811
    script = tmp_path / "hang.py"
    script.write_text("import time, threading\n"
                      "from irg_jax.training.trainer import Trainer\n"
                      "from irg_jax import train\n"
                      "from data_pipelines import command\n"
                      "advance, count = Trainer.advance, []\n"
                      "def stuck(self, batch):\n"
                      "    count.append(1)\n"
                      "    if len(count) == 3:\n"
                      "        time.sleep(1000)\n"
                      "    return advance(self, batch)\n"
                      "Trainer.advance = stuck\n"
                      "command.run(train.main)\n")
    [process] = start(stage, tmp_path / "run", 1, 1, "--config.hang_seconds=30", script=(str(script),))
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 1 and "Timeout (0:00:30)!" in output
    assert "in stuck" in output and output.count("Thread 0x") > 1, output[-2000:]


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_taken(stage, tmp_path):  # noqa: F811
    options = (1, 1, "--config.total_steps=300", "--config.save_every=2", "--config.keep=400")
    [process] = start(stage, tmp_path, *options)
    folder = tmp_path / "stage1"
    wait_for(lambda: latest_step(folder) > 0, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    output = process.communicate(timeout=240)[0]
    last = output.strip().splitlines()[-1]
    assert process.returncode == 1 and last.startswith("error: a checkpoint, of step"), output[-3000:]
    assert "Traceback" not in output and "_SignalingThread" not in output, output[-3000:]
    before = latest_step(folder)
    assert 0 < before < 300
    [(code, output)] = launch(stage, tmp_path, 1, 1, f"--config.total_steps={before + 1}",
                              "--accept_changes=total_steps")
    assert code == 0, output
    assert latest_step(folder) == before + 1


def test_another_config_is_refused_by_name_and_accepted_by_name(base, caplog):  # noqa: F811
    first = config(base, stage="named", total_steps=1)
    assert train(first, base / "run") == 1
    changed = dataclasses.replace(first, total_steps=2, seed=7, save_every=1, keep=3)
    message = r"seed: 42 -> 7; total_steps: 1 -> 2.*--accept_changes=seed,total_steps"
    with pytest.raises(ValueError, match=message):
        train(changed, base / "run")
    with pytest.raises(ValueError, match="names optimizer.lr, and these are compared: .*learning_rate"):
        train(changed, base / "run", accepted=["optimizer.lr"])
    smaller = dataclasses.replace(first, optimizer=dataclasses.replace(first.optimizer, moments="bfloat16"))
    with pytest.raises(ValueError, match="'float32' -> 'bfloat16', which cannot change within a run"):
        train(smaller, base / "run", accepted=["optimizer.moments"])
    with pytest.raises(ValueError, match=r"lora.rank: 16 -> 4.*cannot change within a run"):
        train(dataclasses.replace(first, lora=LoraConfig(rank=4)), base / "run", accepted=["lora.rank"])
    assert train(changed, base / "run", accepted=["seed", "total_steps"]) == 2
    assert "from step 1 on seed: 42 -> 7" in caplog.text
    assert json.loads((base / "run" / "named" / "config.json").read_text())["seed"] == 7


def test_a_full_disk_leaves_the_config_that_was_there(base, tmp_path):  # noqa: F811
    write_config(tmp_path, config(base))
    before, text = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / "config.json").read_text()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_config(tmp_path, config(base, seed=7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "config.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"total_steps": "9"}', "\xff"])
def test_a_config_that_is_not_ours_is_told_with_its_file(base, tmp_path, text):  # noqa: F811
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no trained stage .{tmp_path}/config.json"):
        check_finished(tmp_path)
    if "total_steps" not in text:
        with pytest.raises(ValueError, match=f"begun with cannot be read: {tmp_path}/config.json"):
            check_changes(tmp_path, config(base), 1, [])


@pytest.mark.slow
def test_the_ledger_tells_where_the_time_went(base, monkeypatch):  # noqa: F811
    def slow(self, step, save=Trainer.save):
        with self.ledger.spend("saving"):
            time.sleep(0.5)
        save(self, step)
    monkeypatch.setattr(Trainer, "save", slow)
    begun = time.time()
    assert train(config(base, stage="ledger", total_steps=2, save_every=100), base / "run") == 2
    # Killed after step 2 was told of and before it was saved, it would have lost what came after step 1.
    told = json.loads((base / "run" / "ledger" / "goodput.json").read_text())
    assert told["starts"] == 1 and told["seconds"]["saving"] > 0.5
    assert {"starting", "training", "compiling"} <= told["seconds"].keys()
    assert abs(sum(told["seconds"].values()) - (time.time() - begun)) < 2
    longer = config(base, stage="ledger", total_steps=3, save_every=100)
    assert train(longer, base / "run", accepted=["total_steps"]) == 3
    again = json.loads((base / "run" / "ledger" / "goodput.json").read_text())
    assert again["starts"] == 2 and again["seconds"]["saving"] > 1.0
    assert again["seconds"]["compiling"] > told["seconds"]["compiling"]
