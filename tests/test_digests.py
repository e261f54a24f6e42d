"""Recorded digests find every changed byte when it is read, and a copied folder is the same data set."""

import json
import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_cases import conversation, data_config, write_data_set, write_rows
from data_pipelines import sources
from data_pipelines.check import Wish, check
from data_pipelines.config import GroupConfig
from data_pipelines.datasets import open_source
from data_pipelines.digests import DIGESTS, MANIFEST, file_sha256, read_recorded
from data_pipelines.sources import ParquetRows

WISH = Wish(data_config())


@pytest.fixture
def plain(tmp_path) -> pathlib.Path:
    """A data set as other tools write it: parquet without checksums."""
    rng = np.random.default_rng(1)
    for number in range(2):
        texts = [json.dumps(conversation(rng, "think")) for _ in range(6)]
        path = tmp_path / "data" / "think" / f"{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"conversation": texts}), path, row_group_size=3,
                                    compression="none", use_dictionary=False)
    return tmp_path / "data"


def record(folder: pathlib.Path, **kwargs) -> None:
    found = check(folder, WISH._replace(write=True), workers=1, **kwargs)
    assert not any(group.faults for group in found.values())


def read_all(folder: pathlib.Path, **kwargs) -> list[str]:
    rows = ParquetRows(folder, **kwargs)
    return [rows[i].text for i in range(len(rows))]


def test_flipped_bytes_of_plain_parquet_are_found(plain):
    folder = plain / "think"
    file, truth = folder / "0.parquet", read_all(folder)
    sound, outcomes = file.read_bytes(), {"raised": 0, "harmless": 0}
    silent_before = 0
    positions = np.random.default_rng(0).permutation(len(sound))[:80]
    for position in positions:
        file.write_bytes(flip(sound, position))
        try:
            silent_before += read_all(folder) != truth
        except (ValueError, OSError):
            pass
    file.write_bytes(sound)
    record(plain)
    for position in positions:
        file.write_bytes(flip(sound, position))
        try:
            assert read_all(folder) == truth, f"byte {position} is silently wrong"
            outcomes["harmless"] += 1
        except ValueError as error:
            assert "0.parquet" in str(error)
            outcomes["raised"] += 1
    assert silent_before > 10, "without digests there would be nothing to find"
    assert outcomes["raised"] > silent_before


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1:]


def test_opening_reads_footers_only(plain):
    record(plain)
    file = plain / "think" / "1.parquet"
    file.write_bytes(flip(file.read_bytes(), 60))
    rows = ParquetRows(plain / "think")
    assert rows[0].text
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1.parquet: rows 0 to 2 are damaged .*check --write"):
            rows[6]
    assert rows[9].text


def test_the_digest_goes_with_the_content(plain, tmp_path):
    before = ParquetRows(plain / "think").digest
    record(plain)
    recorded = ParquetRows(plain / "think").digest
    assert recorded != before
    shutil.copytree(plain, tmp_path / "copy", copy_function=shutil.copyfile)
    assert ParquetRows(tmp_path / "copy" / "think").digest == recorded
    write_rows(plain / "think" / "1.parquet", [conversation(np.random.default_rng(5), "think")])
    with pytest.raises(ValueError, match=r"1.parquet has \d+ bytes, .*digests.json says \d+"):
        ParquetRows(plain / "think")
    record(plain)
    assert ParquetRows(plain / "think").digest not in (recorded, before)


def test_a_manifest_is_enough_for_the_digest(tmp_path):
    folder = write_data_set(tmp_path / "data", counts={"think": 6})
    config = data_config(source=str(folder), groups=(GroupConfig("think"),))
    files = sorted((folder / "train" / "think").iterdir())
    manifest = {"files": {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    digest = open_source(config, config.groups[0]).digest
    files[0].touch()
    assert open_source(config, config.groups[0]).digest == digest
    record(folder)  # digests beside it change nothing
    assert open_source(config, config.groups[0]).digest == digest
    manifest["files"]["train/think/0000.parquet"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert open_source(config, config.groups[0]).digest != digest


def test_without_records_names_sizes_and_times_count(plain):
    folder = plain / "think"
    files = sorted(folder.iterdir())
    before = read_recorded(folder, files).content
    assert read_recorded(folder, files).content == before
    files[0].touch()
    assert read_recorded(folder, files).content != before


@pytest.mark.parametrize("spoil, message", [
    (lambda data: (data / "think" / "1.parquet").unlink(), "lists 1.parquet, which does not exist"),
    (lambda data: shutil.copy(data / "think" / "0.parquet", data / "think" / "2.parquet"),
     "2.parquet is not listed in"),
    (lambda data: (data / DIGESTS).write_text("{"), "digests.json cannot be read"),
    (lambda data: (data / DIGESTS).write_text('{"files": {"think/0.parquet": {}}}'), "no digests of files"),
])
def test_files_that_are_not_as_recorded_are_named(plain, spoil, message):
    record(plain)
    spoil(plain)
    with pytest.raises(ValueError, match=message):
        ParquetRows(plain / "think")


def test_digests_may_lie_elsewhere(plain, tmp_path):
    elsewhere = tmp_path / "digests_of_it.json"
    record(plain, digests=elsewhere)
    assert not (plain / DIGESTS).exists()
    file = plain / "think" / "0.parquet"
    file.write_bytes(flip(file.read_bytes(), 60))
    with pytest.raises(ValueError, match="rows 0 to 2 are damaged"):
        read_all(plain / "think", digests=elsewhere)
    files = sorted((plain / "think").iterdir())
    assert len(read_recorded(plain / "think", files, digests=elsewhere).files) == 2
    config = data_config(source=str(plain), split="", groups=(GroupConfig("think"),), digests=str(elsewhere))
    with pytest.raises(ValueError, match="row 0 cannot be read: .* rows 0 to 2 are damaged"):
        open_source(config, config.groups[0])[0]


def test_a_file_that_goes_while_its_rows_are_compared_is_named(plain, monkeypatch):
    record(plain)
    source = ParquetRows(plain / "think")
    monkeypatch.setattr(sources, "group_sha256", lambda *args: open(plain / "gone"))
    with pytest.raises(ValueError, match="0.parquet: rows 0 to 2 are damaged .*No such file"):
        source[0]


def test_records_of_a_broken_data_set_are_not_written(plain):
    write_rows(plain / "think" / "1.parquet", ["no JSON"])
    found = check(plain, WISH._replace(write=True), workers=1)
    assert len(found["think"].faults) == 1 and not (plain / DIGESTS).exists()
