"""Conversion is whole or absent, the same bytes however often it was killed, and names every bad record."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_cases import conversation, data_config, image_part, tokenizer, write_data_set, write_rows
from data_pipelines import conversion
from data_pipelines.array_records import ArrayRecordSource
from data_pipelines.config import GroupConfig, ImageTransform
from data_pipelines.conversion import convert
from data_pipelines.jobs import run_jobs

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = data_config(groups=(GroupConfig("full"),
                             GroupConfig("think", vae_transform=ImageTransform(16, 32, 16))))
# A build that takes its time, so that it can be killed: started with spawn, its workers run it too.
SLOW = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from data_pipelines import conversion
from test_conversion import CONFIG
good = conversion.write_shard
def write_shard(shard):
    time.sleep(0.3)
    return good(shard)
conversion.write_shard = write_shard
if __name__ == "__main__":
    source, out, tokenizer, workers = sys.argv[1:]
    conversion.convert(source, out=out, config=CONFIG, tokenizer=tokenizer, workers=int(workers), shard_mib=0)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """`source` (without a folder for the split), `tokenizer.json`, and the data set `whole`."""
    folder = tmp_path_factory.mktemp("conversion")
    write_data_set(folder, counts={"full": 30, "think": 12})
    (folder / "train").rename(folder / "source")
    tokenizer().save(str(folder / "tokenizer.json"))
    assert run(folder, folder / "whole")
    return folder


def run(made: pathlib.Path, out: pathlib.Path, *, source: pathlib.Path | None = None, **kwargs) -> bool:
    return convert(source or made / "source", out=out, tokenizer=str(made / "tokenizer.json"),
                   **({"config": CONFIG, "workers": 1, "shard_mib": 0} | kwargs))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def test_manifest(made):
    manifest = json.loads((made / "whole" / "manifest.json").read_text())
    assert set(manifest["files"]) == set(manifest["sizes"]) == set(contents(made / "whole")) - {"manifest.json"}
    assert {mode: counts["records"] for mode, counts in manifest["modes"].items()} == {"full": 30, "think": 12}
    assert manifest["modes"]["full"]["latent"] == 30 * 4 and manifest["modes"]["full"]["images"] == 30
    assert manifest["left_out"] == [] and manifest["format"] == "array_record"
    assert manifest["costs"]["think"]["vae_transform"]["max_size"] == 32
    assert manifest["costs"]["full"]["vae_transform"]["max_size"] == 64


def test_processes_do_not_change_the_bytes(made, tmp_path):
    assert run(made, tmp_path / "data", workers=2)
    assert contents(tmp_path / "data") == contents(made / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_built_again_only_if_it_differs(made, tmp_path):
    out = tmp_path / "data"
    assert run(made, out) and not run(made, out)
    other = dataclasses.replace(CONFIG, vit_transform=ImageTransform(14, 28, 14))
    with pytest.raises(ValueError, match="another data set .its costs differ.*--overwrite"):
        run(made, out, config=other)
    assert contents(out) == contents(made / "whole")
    assert run(made, out, config=other, overwrite=True) and not run(made, out, config=other)
    (out / "full" / "costs.npz").unlink()
    with pytest.raises(ValueError, match="its files differ"):
        run(made, out, config=other)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    with pytest.raises(ValueError, match="exists and is no data set"):
        run(made, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"meow"


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_builds_go_on(made, tmp_path, workers):
    out, progress = tmp_path / "data", tmp_path / ".data.progress"
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    arguments = [sys.executable, str(script), str(made / "source"), str(out), str(made / "tokenizer.json"),
                 str(workers)]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 50
    while len(list(progress.rglob("*/*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    family = descendants(process.pid)
    assert len(family) >= (workers if workers > 1 else 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(is_running(pid) for pid in family):
        assert time.monotonic() < deadline, "workers outlive the build"
        time.sleep(0.05)
    notes = sorted(progress.rglob("*/*.json"))
    assert not out.exists() and 3 <= len(notes) < 8
    # One finished shard is damaged meanwhile, and another file was left half written.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".data.partial").rglob("*-of-*")
            if not path.name.startswith(".")}
    spoilt = sorted(kept)[0]
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"?")
    (spoilt.parent / ".half.123.tmp").write_bytes(b"half")
    inodes = {path: path.stat().st_ino for path in kept}
    assert run(made, out)
    assert contents(out) == contents(made / "whole")
    after = {path: out / path.relative_to(tmp_path / ".data.partial") for path in kept}
    again = [path for path in kept if after[path].stat().st_ino != inodes[path]]
    assert spoilt in again and len(again) <= 1 + workers  # what was noted is kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "slow.py"]


def descendants(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [pid for child in children for pid in descendants(int(child))]


def is_running(pid: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_costs_that_a_machine_lost_at_its_end_are_measured_again(made, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(conversion, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "data")
    monkeypatch.undo()
    empty, cut, *_ = sorted((tmp_path / ".data.progress").rglob("*.npz"))
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-30])
    assert run(made, tmp_path / "data") and contents(tmp_path / "data") == contents(made / "whole")


def test_another_plan_starts_anew(made, tmp_path):
    """Shards of another configuration are not taken for this one's."""
    bad = spoilt_source(tmp_path)
    with pytest.raises(ValueError, match="faults"):
        run(made, tmp_path / "data", source=bad)
    assert (tmp_path / ".data.progress").is_dir() and not (tmp_path / "data").exists()
    assert run(made, tmp_path / "data") and contents(tmp_path / "data") == contents(made / "whole")


def spoilt_source(folder: pathlib.Path) -> pathlib.Path:
    """Six bad records of 12, and what each is: two files, two modes."""
    rng = np.random.default_rng(3)
    good = lambda: conversation(rng, "think")
    truncated = image_part(rng, need_loss=True)
    truncated["content"] = truncated["content"][:len(truncated["content"]) // 8 * 4]
    flagless = image_part(rng)
    wrap = lambda *parts: [{"role": "user", "content": "a"}, {"role": "assistant", "content": list(parts)}]
    write_rows(folder / "bad" / "full" / "a.parquet", [
        good(), "{no JSON", [{"role": "system", "content": "be good"}], good(),
        wrap(truncated, flagless), good()])
    write_rows(folder / "bad" / "think" / "b.parquet", [
        wrap({"type": "text", "content": ""}), good(), wrap({"type": "text", "content": "a", "need_los": True}),
        good(), wrap({"type": "text", "content": "\ud800"}), good()])
    return folder / "bad"


FAULTS = [r"a.parquet row 1: the conversation is not JSON", r"a.parquet row 2, turn 0: unknown role 'system'",
          r"a.parquet row 4, turn 1, part 0: the image does not decode",
          r"a.parquet row 4, turn 1, part 1: the image has none of the flags",
          r"b.parquet row 0, turn 1, part 0: the text is empty",
          r"b.parquet row 2, turn 1, part 0: unknown flag",
          r"b.parquet row 4, turn 1, part 0: the text is not Unicode"]


def test_every_bad_record_is_listed_and_nothing_written(made, tmp_path):
    bad = spoilt_source(tmp_path)
    with pytest.raises(ValueError) as caught:
        run(made, tmp_path / "data", source=bad)
    lines = str(caught.value).split("\n")
    assert lines[0].startswith("7 faults in") and len(lines) == 8
    for line, wanted in zip(lines[1:], FAULTS, strict=True):
        assert wanted in line
    assert not (tmp_path / "data").exists()
    # What was written goes on from there, once its user says that it may.
    assert run(made, tmp_path / "data", source=bad, drop_bad=True)
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["left_out"] == lines[1:]
    for mode in ("full", "think"):
        assert len(ArrayRecordSource(tmp_path / "data" / mode, mode=mode)) == 3


def test_unknown_roles_may_be_left_out(made, tmp_path):
    rng = np.random.default_rng(0)
    turns = [{"role": "system", "content": "be good"}, *conversation(rng, "full")]
    write_rows(tmp_path / "source" / "full" / "a.parquet", [turns])
    config = dataclasses.replace(CONFIG, unknown_role="ignore")
    assert run(made, tmp_path / "data", source=tmp_path / "source", config=config)
    assert len(ArrayRecordSource(tmp_path / "data" / "full", mode="full")[0].parts) == 3


def test_all_files_that_cannot_be_read_are_listed(made, tmp_path):
    for name in ("a", "b"):
        write_rows(tmp_path / "source" / "full" / f"{name}.parquet", ["x"], column="talk")
    (tmp_path / "source" / "full" / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError) as caught:
        run(made, tmp_path / "data", source=tmp_path / "source")
    assert [line.split("full/")[1][:10] for line in str(caught.value).split("\n")[1:]] == [
        "a.parquet:", "b.parquet:", "c.parquet:"]
    with pytest.raises(ValueError, match="holds neither"):
        run(made, tmp_path / "data", source=tmp_path / "source" / "full")


def test_a_link_leads_to_the_data_set(made, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    assert run(made, tmp_path / "link") and contents(tmp_path / "disk" / "data") == contents(made / "whole")
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["data"]


def test_two_builds_of_one_data_set_do_not_mix(made, tmp_path, monkeypatch):
    write = conversion.write_shard
    def write_and_build_again(shard):
        with pytest.raises(ValueError, match="another build is writing .*data'; wait"):
            run(made, tmp_path / "data")
        return write(shard)
    monkeypatch.setattr(conversion, "write_shard", write_and_build_again)
    assert run(made, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(made / "whole")


def test_a_full_disk_is_a_sentence_and_costs_nothing_that_was_written(made, tmp_path, monkeypatch):
    class FullDisk:
        """Takes three shards."""
        written = 0

        def __init__(self, path, options):
            self._writer = writer(path, options)

        def write(self, data):
            if FullDisk.written == 3:
                raise RuntimeError("write() failed: No space left on device\nmore")
            self._writer.write(data)

        def close(self):
            FullDisk.written += 1
            self._writer.close()
    writer = conversion.array_record_module.ArrayRecordWriter
    with monkeypatch.context() as patch:
        patch.setattr(conversion.array_record_module, "ArrayRecordWriter", FullDisk)
        with pytest.raises(ValueError, match="cannot be written .*No space left on device.; make room"):
            run(made, tmp_path / "data")
    assert len(list((tmp_path / ".data.partial").rglob("conv*-of-*"))) == 3
    assert run(made, tmp_path / "data") and contents(tmp_path / "data") == contents(made / "whole")


def die(job: int) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def test_a_killed_worker_is_a_sentence():
    with pytest.raises(ValueError, match="a worker process was killed"):
        list(run_jobs(die, range(8), workers=2))


def test_the_command(made, tmp_path):
    arguments = [sys.executable, "-m", "data_pipelines.build", "--config=configs/irgl_stage1.py",
                 "--format=array_record", f"--source={made / 'source'}", f"--out={tmp_path / 'data'}",
                 f"--tokenizer={made / 'tokenizer.json'}", "--workers=2"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote 42 records of 2 modes" in done.stdout, done.stderr
    arguments[5] = f"--source={spoilt_source(tmp_path)}"
    done = subprocess.run(arguments + ["--overwrite"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") >= 8 and "error: 7 faults" in done.stderr
    assert len(ArrayRecordSource(tmp_path / "data" / "full", mode="full")) == 30
