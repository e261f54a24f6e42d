"""A local folder stands for the bucket: whole copies, verified, resumed, and nothing else touched."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from data_cases import data_config, tokenizer, write_data_set
from data_pipelines import staging
from data_pipelines.pipeline import make_iterator
from data_pipelines.staging import stage


@pytest.fixture
def bucket(tmp_path):
    folder = tmp_path / "bucket"
    write_data_set(folder, counts={"full": 6})
    files = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in folder.rglob("*.parquet")}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".staging.lock"}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_copy_is_whole_and_the_second_time_copies_nothing(bucket, tmp_path, monkeypatch, scheme):
    out = stage(f"{scheme}{bucket}", tmp_path / "disk")
    assert contents(out) == contents(bucket) and len(contents(out)) == 3
    monkeypatch.setattr(staging, "_copy", lambda *args: pytest.fail("copied again"))
    assert stage(str(bucket), out) == out


def test_a_changed_file_is_copied_again_and_only_that(bucket, tmp_path, monkeypatch):
    out = stage(str(bucket), tmp_path / "disk")
    changed = bucket / "train" / "full" / "0001.parquet"
    kept = (out / "train" / "full" / "0000.parquet").stat().st_ino
    (bucket / "manifest.json").unlink()
    (out / "manifest.json").unlink()
    changed.write_bytes(changed.read_bytes()[::-1])
    os.utime(changed, ns=(1, 1))
    stage(str(bucket), out)
    assert contents(out) == contents(bucket)
    assert (out / "train" / "full" / "0000.parquet").stat().st_ino == kept


def test_a_file_that_is_not_the_manifests_never_gets_its_name(bucket, tmp_path):
    file = bucket / "train" / "full" / "0001.parquet"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="0001.parquet arrived with .* expected .* Upload the file again"):
        stage(str(bucket), tmp_path / "disk")
    assert not (tmp_path / "disk" / "train" / "full" / "0001.parquet").exists()
    data[50] ^= 1
    file.write_bytes(data)
    assert contents(stage(str(bucket), tmp_path / "disk")) == contents(bucket)


def test_what_is_missing_is_named(bucket, tmp_path):
    with pytest.raises(ValueError, match="cannot list .*nowhere"):
        stage(str(tmp_path / "nowhere"), tmp_path / "disk")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no file"):
        stage(str(tmp_path / "empty"), tmp_path / "disk")
    (bucket / "train" / "full" / "0001.parquet").unlink()
    with pytest.raises(ValueError, match="manifest.json lists 'train/full/0001.parquet', which is not there"):
        stage(str(bucket), tmp_path / "disk")
    (bucket / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        stage(str(bucket), tmp_path / "disk")


def test_a_folder_with_other_files_and_a_small_disk_are_refused(bucket, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds 'letter.txt', which .* does not"):
        stage(str(bucket), tmp_path / "disk")
    assert (tmp_path / "disk" / "letter.txt").read_text() == "mine"
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ValueError, match="GiB left; use a larger disk"):
        stage(str(bucket), tmp_path / "other")


def test_killed_in_the_middle_it_goes_on(bucket, tmp_path):
    big = bucket / "train" / "full" / "9999.bin"
    big.write_bytes(os.urandom(64 * 2**20))
    out = tmp_path / "disk"
    code = ("import sys, time; from data_pipelines import staging; staging._PIECE = 2**16\n"
            "update = staging.tqdm.update\n"
            "staging.tqdm.update = lambda *args: (time.sleep(0.01), update(*args))\n"
            "print('begun', flush=True); staging.stage(*sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", code, str(bucket), str(out)], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.monotonic() + 20
    while not list(out.rglob("9999.bin.staging.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(out.rglob("*.staging.partial")) and not (out / "train" / "full" / "9999.bin").exists()
    assert contents(stage(str(bucket), out)) == contents(bucket)


def test_training_reads_the_staged_copy_and_gets_the_same_batches(bucket, tmp_path):
    def first(**fields):
        iterator = make_iterator(data_config(source=str(bucket), **fields), tokenizer())
        batch, place = next(iterator), iterator.packs.config.source
        iterator.close()
        return batch, place
    batch, place = first(stage_dir=str(tmp_path / "disk"))
    assert place == str(tmp_path / "disk")
    expected, _ = first()
    assert (batch.text_ids == expected.text_ids).all() and (batch.latent_pixels == expected.latent_pixels).all()
