"""A local folder stands for the bucket: whole copies, verified, resumed, and nothing else touched."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from data_cases import data_config, tokenizer, write_data_set
from data_pipelines import staging
from data_pipelines.array_records import ArrayRecordSource
from data_pipelines.config import GroupConfig
from data_pipelines.conversion import convert
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
            if path.is_file() and not path.name.startswith(".staging.")}


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


# ---- a host's share ---------------------------------------------------------------------------

def test_only_the_groups_of_the_mixture_are_copied(tmp_path):
    write_data_set(tmp_path / "bucket", counts={"full": 6, "think": 6, "improving": 6})
    (tmp_path / "bucket" / "digests.json").write_text("{}")
    (tmp_path / "bucket" / "heldout").mkdir()
    (tmp_path / "bucket" / "heldout" / "a.parquet").write_bytes(b"not wanted")
    config = data_config(source=str(tmp_path / "bucket"), stage_dir=str(tmp_path / "disk"),
                         groups=(GroupConfig("full"), GroupConfig("reasons", folder="think")))
    assert sorted(contents(staging.stage_mixture(config))) == [
        "digests.json", "train/full/0000.parquet", "train/full/0001.parquet", "train/think/0000.parquet",
        "train/think/0001.parquet"]
    # Another mixture of the same bucket goes into the same folder.
    staging.stage_mixture(dataclasses.replace(config, groups=(GroupConfig("improving"),)))
    assert len(contents(tmp_path / "disk")) == 7


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A built data set of one group in 30 shards, and its configuration."""
    folder = tmp_path_factory.mktemp("built")
    write_data_set(folder / "source", counts={"full": 120})
    tokenizer().save(str(folder / "tokenizer.json"))
    config = data_config(source=str(folder / "bucket"), packs_per_step=2, prefetch=1, read_threads=1)
    convert(folder / "source", out=folder / "bucket", config=config, tokenizer=str(folder / "tokenizer.json"),
            workers=1, shard_mib=0)
    assert len(shards(folder / "bucket")) == 30
    return config


def shards(folder) -> set[str]:
    return {path.name for path in folder.rglob("*.array_record-*")}


def digests(iterator, count) -> list[bytes]:
    return [b"".join(array.tobytes() for array in (batch.text_ids, batch.latent_pixels))
            for batch, _ in zip(iterator, range(count))]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_host_copies_the_shards_of_its_own_packs(built, tmp_path, workers):
    fields, shares = dict(workers=workers, prefetch=1 + workers), []
    for host in range(2):
        plain = make_iterator(built, tokenizer(), rows=[host])
        config = dataclasses.replace(built, stage_dir=str(tmp_path / f"disk{host}"), stage_steps=5, **fields)
        staged = make_iterator(config, tokenizer(), rows=[host])
        source = staged.packs._sources["full"]
        wanted = {source.files[source._find(entry.index)].name for step in range(5)
                  for entry in staged.packs.planner[2 * step + host].entries}
        found = shards(tmp_path / f"disk{host}")
        # Workers may be ahead of step 5 already.
        assert (found == wanted or (workers and found > wanted)) and len(wanted) < 30
        assert staged.packs.fingerprint == plain.packs.fingerprint
        assert digests(staged, 5) == digests(plain, 5) and shards(tmp_path / f"disk{host}") >= wanted
        # Later steps bring the rest, each shard when it is first read.
        assert digests(staged, 20) == digests(plain, 20)
        assert shards(tmp_path / f"disk{host}") > wanted
        staged.close(), plain.close()
        shares.append(wanted)
    assert shares[0] != shares[1]


def test_a_group_is_opened_while_another_process_copies_a_shard_into_it(built, tmp_path):
    config = dataclasses.replace(built, stage_dir=str(tmp_path / "disk"), stage_steps=1)
    first = make_iterator(config, tokenizer())
    first.close()
    folder = first.packs._sources["full"].folder
    (folder / "full-train.array_record-00007-of-00030.staging.partial").write_bytes(b"half")
    assert len(ArrayRecordSource(folder, mode="full")) == 120


def test_a_shard_that_cannot_be_fetched_is_named(built, tmp_path):
    bucket = shutil.copytree(built.source, tmp_path / "bucket")
    config = dataclasses.replace(built, source=str(bucket), stage_dir=str(tmp_path / "disk"), stage_steps=1,
                                 max_bad_share=0.0)
    first = make_iterator(config, tokenizer())
    first.close()
    for shard in bucket.rglob("*.array_record-*"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="array_record-.* arrived with .* expected .* Upload the file again"):
        make_iterator(dataclasses.replace(config, stage_steps=50), tokenizer())
    shutil.rmtree(bucket)
    source = first.packs._sources["full"]
    missing = next(i for i in range(120) if not source.files[source._find(i)].exists())
    with pytest.raises(ValueError, match="bucket.*array_record-.* could not be copied"):
        source[missing]


def test_steps_without_a_folder_are_refused():
    with pytest.raises(ValueError, match="stage_steps is 5, but stage_dir is empty"):
        data_config(stage_steps=5)


@pytest.mark.parametrize("source, uri", [
    ("gs://b/x", "gs://b/x?retry_limit_seconds=60"),
    ("gs://b/x?scheme=http", "gs://b/x?scheme=http&retry_limit_seconds=60"),
    ("gs://b/x?retry_limit_seconds=5", "gs://b/x?retry_limit_seconds=5"), ("s3://b/x", "s3://b/x")])
def test_an_absent_network_is_told_soon(monkeypatch, source, uri):
    opened = lambda uri: (uri, "b/x/")
    monkeypatch.setattr(staging, "fs", SimpleNamespace(FileSystem=SimpleNamespace(from_uri=opened)))
    assert staging._open(source) == (uri, "b/x")


def test_an_unknown_source_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot open foo://x .*correct the source"):
        stage("foo://x", tmp_path / "disk")
