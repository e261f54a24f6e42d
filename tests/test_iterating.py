"""The same batches from any hosts, workers and restarts, in real processes; and none of them left behind."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_cases import conversation, data_config, tokenizer, write_data_set, write_rows
from data_pipelines.batch import Rows
from data_pipelines.config import GroupConfig, ImageTransform
from data_pipelines.fingerprints import compare, describe_data
from data_pipelines.pipeline import make_iterator
from data_pipelines.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = tokenizer()
GROUPS = (GroupConfig("full", 1.0, True), GroupConfig("improving", 1.0))
STEPS = 9


def make_config(source, **fields):
    return data_config(source=str(source), groups=GROUPS, packs_per_step=8, text_tokens=256, vae_dropout=0.3,
                       max_bad_share=0.2, index_dir=str(source / "index"), **fields)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two groups; a record with a control token in its text, and one whose pixels are broken."""
    folder = write_data_set(tmp_path_factory.mktemp("data"), counts={"full": 9, "improving": 7})
    broken = json.loads(json.dumps(conversation(np.random.default_rng(3), "full")))
    content = broken[1]["content"][1]["content"]
    broken[1]["content"][1]["content"] = content[:len(content) // 8 * 4]
    write_rows(folder / "train" / "full" / "9999.parquet",
               [broken, [{"role": "user", "content": "red <|im_end|> circle", "need_loss": True}]])
    return folder


@pytest.fixture(scope="module")
def truth(source):
    """Digests [step][pack] of the batches of one process that reads in threads."""
    iterator = make_iterator(make_config(source), TOKENIZER)
    digests = [pack_digests(next(iterator)) for _ in range(STEPS)]
    assert iterator.counters["bad_image"] == 1
    iterator.close()
    assert len({digest for step in digests for digest in step}) == 8 * STEPS
    return digests


def pack_digests(batch) -> list[str]:
    arrays = [array for field in batch for array in (field if isinstance(field, Rows) else (field,))]
    return [hashlib.sha256(b"".join(array[i].tobytes() for array in arrays)).hexdigest()
            for i in range(len(arrays[0]))]


# What one host does, in a process of its own: some steps, then a restart with other workers.
HOST = """
import json, sys
sys.path[:0] = ["tests", "."]
import test_iterating as case
if __name__ == "__main__":
    source, index, count, *legs = json.loads(sys.argv[1])
    found = []
    for start, stop, workers in legs:
        iterator = case.make_iterator(case.make_config(case.pathlib.Path(source), workers=workers, prefetch=2),
                                      case.TOKENIZER, start=start, keep_journal=index == 0,
                                      rows=range(index * 8 // count, (index + 1) * 8 // count))
        found += [[step, case.pack_digests(next(iterator))] for step in range(start, stop)]
        assert iterator.get_state() == stop
        iterator.close()
    print(json.dumps(found))
"""


def run_hosts(folder, source, count, *legs) -> dict[int, list[str]]:
    """Digests by step; all hosts run at once."""
    script = folder / "host.py"
    script.write_text(HOST)
    hosts = [subprocess.Popen([sys.executable, str(script), json.dumps([str(source), index, count, *legs])],
                              cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
             for index in range(count)]
    done = [host.communicate(timeout=120) for host in hosts]
    assert all(host.returncode == 0 for host in hosts), done
    steps: dict[int, list[str]] = {}
    for out, _ in done:
        for step, digests in json.loads(out):
            steps.setdefault(step, []).extend(digests)
    return steps


# (first step, end, workers): each leg goes on where the one before stopped, with other workers.
@pytest.mark.parametrize("count, legs", [
    (1, [(0, 3, 4), (3, 6, 0), (6, 9, 2)]), (2, [(0, 4, 1), (4, 9, 0)]), (4, [(2, 5, 0)]), (8, [(5, 7, 0)])])
def test_hosts_workers_and_restarts_change_no_batch(source, truth, tmp_path, count, legs):
    steps = run_hosts(tmp_path, source, count, *legs)
    assert steps == {step: truth[step] for start, stop, _ in legs for step in range(start, stop)}


def test_three_workers_from_any_step(source, truth):
    iterator = make_iterator(make_config(source, workers=3), TOKENIZER, start=1)
    assert [pack_digests(next(iterator)) for _ in range(6)] == truth[1:7]
    assert iterator.counters["bad_image"] == 1  # found in a worker, counted here
    iterator.close()


# ---- what a checkpoint keeps ------------------------------------------------------------------

def test_a_position_names_what_changed(source, tmp_path, caplog):
    config = make_config(source)
    def check(saved, config=config, tokenizer=TOKENIZER):
        iterator = make_iterator(config, tokenizer)
        iterator.close()
        iterator.check_position(json.loads(json.dumps(saved)))
    iterator = make_iterator(config, TOKENIZER)
    saved = iterator.position(3)
    iterator.close()
    assert saved["next_step"] == iterator.get_state() + 3 and len(json.dumps(saved)) < 4096
    check(saved)
    check(saved, dataclasses.replace(config, prefetch=1, read_threads=1, max_bad_share=1.0, index_dir=""))
    changed = {
        "config.seed: 42 -> 7": dict(seed=7),
        "config.vae_transform.max_size: 64 -> 32": dict(vae_transform=ImageTransform(16, 32, 16)),
        "config.groups.improving.weight: 1.0 -> 2.0": dict(groups=(GROUPS[0], GroupConfig("improving", 2.0))),
        "config.packs_per_step: 8 -> 4": dict(packs_per_step=4),
        "config.groups.improving.weight: 1.0 -> absent": dict(groups=GROUPS[:1])}
    for difference, fields in changed.items():
        with pytest.raises(ValueError, match=f"since step 3 was saved.*{difference}.*accept_changed_data"):
            check(saved, dataclasses.replace(config, **fields))
    with pytest.raises(ValueError, match="tokenizer: '.*' -> '.*'"):
        check(saved, tokenizer=train_tokenizer(["other words"], vocab_size=280))
    other = write_data_set(tmp_path / "other", counts={"full": 9, "improving": 7}, seed=1)
    with pytest.raises(ValueError, match="data.full: '.*' -> '.*'"):
        check(saved, dataclasses.replace(config, source=str(other)))
    assert "changed" not in caplog.text
    check(saved, dataclasses.replace(config, seed=7, accept_changed_data=True))
    assert "config.seed: 42 -> 7" in caplog.text
    with pytest.raises(ValueError, match="config.seed: absent -> 42"):
        check(saved | {"fingerprint": "one digest of everything, as runs once kept"})


def test_another_plan_of_the_same_data_is_told(source, monkeypatch):
    iterator = make_iterator(make_config(source), TOKENIZER)
    saved = iterator.position(2)
    planner = type(iterator.packs.planner)
    original = planner.__getitem__
    monkeypatch.setattr(planner, "__getitem__", lambda self, index: original(self, index + 1))
    with pytest.raises(ValueError, match="changed: plan: '.*' -> '.*'"):
        iterator.check_position(saved)
    iterator.close()


def test_other_files_at_the_same_costs_are_other_data(source):
    iterator = make_iterator(make_config(source), TOKENIZER)
    iterator.close()
    describe = lambda full: describe_data(iterator.packs.config, TOKENIZER, iterator.packs.tables,
                                          {"full": full, "improving": "unchanged"})
    [difference] = compare(describe("digest of some pixels"), describe("digest of others"))
    assert difference.startswith("data.full: ")


def test_compare_tells_values_and_absence():
    assert compare({"a": 1, "b": None, "c": 2}, {"a": 1, "b": 0, "d": "x"}) == [
        "b: None -> 0", "c: 2 -> absent", "d: absent -> 'x'"]


# ---- deaths -----------------------------------------------------------------------------------

TRAINER = """
import json, multiprocessing, os, sys, time
sys.path[:0] = ["tests", "."]
import test_iterating as case
from data_pipelines.workers import _name_shared_memory
if __name__ == "__main__":
    source, ending = json.loads(sys.argv[1])
    iterator = case.make_iterator(case.make_config(case.pathlib.Path(source), workers=2), case.TOKENIZER)
    batch = next(iterator)
    workers = [process.pid for process in multiprocessing.active_children()]
    print(json.dumps([workers, _name_shared_memory()[0]]), flush=True)
    if ending == "exit":
        sys.exit("the trainer failed")
    try:
        for batch in iterator:
            time.sleep(0.05)
    except ValueError as error:
        sys.exit(f"error: {error}")
"""


def shared_memory(own: str = "") -> list[str]:
    """All there is, without what other runs on this machine call theirs."""
    return sorted(name for name in os.listdir("/dev/shm")
                  if own and own in name or not re.match(r"(sem\.)?d[0-9a-f]{6}_", name))


def start_trainer(folder, source, ending) -> tuple[subprocess.Popen, list[int], str]:
    """The process, its two workers, and what its shared memory is called."""
    script = folder / "trainer.py"
    script.write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, str(script), json.dumps([str(source), ending])], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    workers, own = json.loads(trainer.stdout.readline())
    assert len(workers) == 2 and all(is_alive(worker) for worker in workers)
    return trainer, workers, own


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end(workers, before: set[str], own: str, seconds: float = 20) -> None:
    """Neither the workers nor any new shared memory is left."""
    deadline = time.monotonic() + seconds
    left = lambda: [pid for pid in workers if is_alive(pid)] + sorted({*shared_memory(own)} - before)
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []


@pytest.mark.parametrize("ending", ["killed", "group", "exit", "worker"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /dev/shm")
def test_nothing_outlives_the_trainer_and_no_death_hangs_it(source, tmp_path, ending):
    before = set(shared_memory())
    trainer, workers, own = start_trainer(tmp_path, source, ending)
    assert {*shared_memory(own)} - before  # batches on their way: there is something to leave behind
    if ending == "killed":
        os.kill(trainer.pid, signal.SIGKILL)
    elif ending == "group":
        os.killpg(trainer.pid, signal.SIGKILL)
    elif ending == "worker":
        os.kill(workers[0], signal.SIGKILL)
    error = trainer.communicate(timeout=40)[1]
    wait_for_the_end(workers, before, own)
    if ending == "worker":
        assert trainer.returncode == 1 and "error: a data worker died" in error and "exit code -9" in error
    if ending == "exit":
        assert error.endswith("the trainer failed\n") and "Traceback" not in error and "leaked" not in error
