"""A built TFDS data set gives the records and batches of its source, and no damaged byte."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_cases import data_config, tokenizer, write_data_set
from data_pipelines.array_records import ArrayRecordSource
from data_pipelines.config import GroupConfig, ImageTransform
from data_pipelines.conversion import convert
from data_pipelines.costs import read_costs
from data_pipelines.datasets import open_source
from data_pipelines.digests import MANIFEST
from data_pipelines.faults import BadRecords
from data_pipelines.inspection import list_roles
from data_pipelines.pipeline import make_iterator
from data_pipelines.records import Limits, Record
from data_pipelines.samples import measure
from data_pipelines.sources import ParquetRows
from data_pipelines.stored_costs import COSTS, describe_costs
from data_pipelines.tfds_builder import Conversations, make_example

ROOT = pathlib.Path(__file__).parents[1]
MODES = ("full", "improving", "think")
CONFIG = data_config(groups=tuple(GroupConfig(mode) for mode in MODES), vae_dropout=0.3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A folder with `source`, the data set `built` from it in several shards, and `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("tfds")
    write_data_set(folder / "source", counts={"full": 11, "improving": 9, "think": 6})
    tokenizer().save(str(folder / "tokenizer.json"))
    assert convert(folder / "source", out=folder / "built", config=CONFIG, shard_mib=0, workers=1,
                   tokenizer=str(folder / "tokenizer.json"))
    return folder


def without_places(record: Record) -> Record:
    return Record(tuple(part._replace(place="") for part in record.parts), record.mode, "")


def sources(made: pathlib.Path, mode: str):
    return (open_source(dataclasses.replace(CONFIG, source=str(made / name)), GroupConfig(mode))
            for name in ("source", "built"))


@pytest.mark.parametrize("mode", MODES)
def test_records_are_those_of_the_source(made, mode):
    parquet, built = sources(made, mode)
    assert isinstance(built, ArrayRecordSource) and len(built) == len(parquet)
    for i in range(len(built)):
        assert without_places(built[i]) == without_places(parquet[i])
        assert len({part.place for part in built[i].parts}) == len(built[i].parts)
    with pytest.raises(IndexError):
        built[len(built)]


def test_batches_are_those_of_the_source(made):
    configs = (dataclasses.replace(CONFIG, source=str(made / name)) for name in ("source", "built"))
    parquet, built = (make_iterator(config, tokenizer()) for config in configs)
    for _ in range(5):
        one, other = next(parquet), next(built)
        for field, wanted, found in zip(one._fields, one, other):
            for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (wanted, found))):
                np.testing.assert_array_equal(a, b, err_msg=field)
    parquet.close()
    built.close()


def test_tfds_reads_it(made):
    builder = tfds.builder_from_directory(made / "built" / "train" / "improving")
    rows, data = ParquetRows(made / "source" / "train" / "improving"), builder.as_data_source("train")
    assert len(data) == 9 and len(builder.info.splits["train"].shard_lengths) == 3
    for i, example in enumerate(data):
        parts = example["parts"]
        names = [builder.info.features["parts"]["role"].int2str(int(role)) for role in parts["role"]]
        assert names == list_roles(rows[i].text) == ["user", *["assistant"] * 4]
        assert [content[:4] == b"\x89PNG" for content in parts["content"]] == [False, False, True, False, True]
        assert np.array(parts["need_vit"]).tolist() == [False, False, True, False, False]
    assert len(builder.as_data_source("train[:50%]")) == 4


def test_the_builder_alone_writes_the_same_examples(made, tmp_path):
    """Through TFDS' own writer, in one process."""
    truth, group = next(sources(made, "full")), GroupConfig("full")
    examples = [make_example(truth[i], ["user", "assistant", "assistant"],
                             measure(truth[i], CONFIG, tokenizer(), group=group)) for i in range(3)]
    builder = Conversations(mode="full", examples=examples, data_dir=str(tmp_path))
    builder.download_and_prepare()
    ours = tfds.builder_from_directory(made / "built" / "train" / "full").as_data_source("train")
    theirs = builder.as_data_source("train")
    assert len(theirs) == 3
    for i in range(3):
        np.testing.assert_equal(theirs[i], ours[i])
    assert without_places(ArrayRecordSource(builder.data_path, mode="full")[2]) == without_places(truth[2])


def test_costs_come_along(made):
    group = GroupConfig("improving")
    parquet, built = sources(made, "improving")
    items, offsets = built.stored_costs(describe_costs(CONFIG, group, tokenizer()))
    for i in range(len(parquet)):
        wanted = measure(parquet[i], CONFIG, tokenizer(), group=group)
        np.testing.assert_array_equal(items[offsets[i]:offsets[i + 1]], wanted)
    other = dataclasses.replace(CONFIG, vit_transform=ImageTransform(14, 28, 14))
    assert built.stored_costs(describe_costs(other, group, tokenizer())) is None
    assert built.stored_costs(describe_costs(CONFIG, dataclasses.replace(
        group, vae_transform=ImageTransform(16, 32, 16)), tokenizer())) is None
    # Budgets arrange the same records: they are not part of what was measured.
    wide = dataclasses.replace(CONFIG, text_tokens=999, vae_dropout=0.9)
    assert built.stored_costs(describe_costs(wide, group, tokenizer())) is not None


def test_no_image_is_opened_for_its_costs(made, monkeypatch):
    group, bad = GroupConfig("improving"), BadRecords({"improving": 9}, 0.0)
    parquet, built = sources(made, "improving")
    wanted = read_costs(parquet, group=group, config=CONFIG, tokenizer=tokenizer(), bad=bad)
    monkeypatch.setattr(ArrayRecordSource, "__getitem__", None)  # reading a record raises
    table = read_costs(built, group=group, config=CONFIG, tokenizer=tokenizer(), bad=bad)
    for field, found in zip(wanted, table):
        np.testing.assert_array_equal(found, field)
    other = dataclasses.replace(CONFIG, vit_transform=ImageTransform(14, 28, 14))
    with pytest.raises(TypeError):
        read_costs(built, group=group, config=other, tokenizer=tokenizer(), bad=bad)


def test_no_flipped_byte_is_read(made, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(made / "built" / "train" / "full", folder)
    source = ArrayRecordSource(folder, mode="full")
    truth, file = [source[i] for i in range(4)], source.files[0]
    sound, raised = file.read_bytes(), 0
    used = np.flatnonzero(np.frombuffer(sound, np.uint8))  # a shard of four records is mostly padding
    for position in np.random.default_rng(0).permutation(used)[:100]:
        file.write_bytes(sound[:position] + bytes([sound[position] ^ 0x10]) + sound[position + 1:])
        try:
            damaged = ArrayRecordSource(folder, mode="full")
            assert [damaged[i] for i in range(4)] == truth, f"byte {position} is silently wrong"
        except ValueError as error:
            assert file.name in str(error) and "damaged" in str(error)
            raised += 1
    assert raised > 60


def test_opening_reads_no_shard(made, tmp_path):
    """Shards of zeros, each of its size: the start notices nothing, the first read does."""
    folder = tmp_path / "data"
    shutil.copytree(made / "built", folder)
    for shard in folder.rglob("*.array_record-*"):
        shard.write_bytes(bytes(shard.stat().st_size))
    source = open_source(dataclasses.replace(CONFIG, source=str(folder)), CONFIG.groups[0])
    whole = open_source(dataclasses.replace(CONFIG, source=str(made / "built")), CONFIG.groups[0])
    assert (len(source), source.digest) == (len(whole), whole.digest)
    for row in range(2):
        with pytest.raises(ValueError, match=f"record {row} cannot be read: .* is damaged"):
            source[row]


def test_damage_names_the_record_and_spares_the_others(made, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(made / "built" / "train" / "full", folder)
    source = ArrayRecordSource(folder, mode="full")
    data, first = source.files[2].read_bytes(), 5
    positions = [i for i in range(len(data)) if data[i]]
    position = positions[len(positions) // 2]  # amid the chunks, one for each record
    source.files[2].write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])
    source, bad = ArrayRecordSource(folder, mode="full"), []
    for i in range(len(source)):
        try:
            source[i]
        except ValueError as error:
            assert f"00002-of-00004 record {i - first} is damaged" in str(error)
            bad.append(i)
    assert len(bad) == 1 and first <= bad[0] < first + 4


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: next(folder.glob("*00001-of*")).unlink(), "lists .*00001-of-00004, which does not exist"),
    (lambda folder: next(folder.glob("*00001-of*")).write_bytes(b"short"), "has 5 bytes, .*manifest.json says"),
    (lambda folder: (folder / "features.json").write_text("{"), "has 1 bytes"),
    (lambda folder: (folder / "extra.txt").write_text("?"), "extra.txt is not listed"),
])
def test_a_changed_data_set_is_refused_at_the_start(made, tmp_path, spoil, message):
    shutil.copytree(made / "built", tmp_path / "built")
    spoil(tmp_path / "built" / "train" / "full")
    with pytest.raises(ValueError, match=message):
        ArrayRecordSource(tmp_path / "built" / "train" / "full", mode="full")


@pytest.mark.parametrize("name, content, message", [
    ("dataset_info.json", "{", "describes no data set"),
    ("dataset_info.json", "[]", "describes no data set"),
    ("features.json", "{}", "describes no data set|other features"),
])
def test_metadata_without_a_manifest_is_not_trusted(made, tmp_path, name, content, message):
    shutil.copytree(made / "built" / "train" / "full", tmp_path / "full")
    (tmp_path / "full" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        ArrayRecordSource(tmp_path / "full", mode="full")


def test_a_damaged_cost_file_is_named(made, tmp_path):
    shutil.copytree(made / "built" / "train" / "full", tmp_path / "full")
    data = (tmp_path / "full" / COSTS).read_bytes()
    (tmp_path / "full" / COSTS).write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    with pytest.raises(ValueError, match="costs.npz: the costs are damaged"):
        ArrayRecordSource(tmp_path / "full", mode="full").stored_costs({})


def test_limits_hold_when_reading(made):
    folder = made / "built" / "train" / "full"
    with pytest.raises(ValueError, match=r"record 0, part 0: text of \d+ characters is over max_text_chars 1"):
        ArrayRecordSource(folder, mode="full", limits=Limits(max_text_chars=1))[0]


def test_the_digest_goes_with_the_content(made, tmp_path):
    digest = ArrayRecordSource(made / "built" / "train" / "full", mode="full").digest
    shutil.copytree(made / "built", tmp_path / "copy", copy_function=shutil.copyfile)
    assert ArrayRecordSource(tmp_path / "copy" / "train" / "full", mode="full").digest == digest
    manifest = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    manifest["files"]["train/full/costs.npz"] = "0" * 64
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(manifest))
    assert ArrayRecordSource(tmp_path / "copy" / "train" / "full", mode="full").digest != digest


def test_threads_share_a_source(made, monkeypatch):
    monkeypatch.setattr("data_pipelines.array_records._OPEN_FILES", 1)  # so that readers come and go
    source = ArrayRecordSource(made / "built" / "train" / "full", mode="full")
    truth, wrong = [source[i] for i in range(len(source))], []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(len(source), size=200).tolist():
            if source[i] != truth[i]:
                wrong.append(i)
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tensorflow_is_never_imported(made, tmp_path):
    code = (f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_tfds_builder import *\n"
            f"convert({str(made / 'source')!r}, out={str(tmp_path / 'out')!r}, config=CONFIG, workers=1, "
            f"tokenizer={str(made / 'tokenizer.json')!r})\n"
            f"assert ArrayRecordSource({str(tmp_path / 'out/train/full')!r}, mode='full')[3]\n"
            "print([name for name in ('tensorflow', 'torch') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
