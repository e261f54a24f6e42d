"""Every kind of records from files to packs: rows and lines in any order, and files that are refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_cases import data_config, tokenizer
from data_pipelines.config import GroupConfig
from data_pipelines.datasets import open_source
from data_pipelines.digests import DIGESTS, file_digest
from data_pipelines.lines import JsonLines
from data_pipelines.pipeline import Packs
from data_pipelines.sources import ParquetRows
from kind_cases import KINDS, write_kinds, write_table

CAPTIONS = '{"a": "a cat"}'


def test_lines_in_any_order_from_any_thread(tmp_path):
    texts = [b"x" * int(size) for size in np.random.default_rng(0).integers(1, 99, 200)]
    (tmp_path / "a.jsonl").write_bytes(b"\n\n" + b"\n".join(texts[:150]) + b"\n\n")
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(texts[150:]))  # without an end of the last line
    lines = JsonLines(tmp_path)
    assert len(lines) == len(texts)
    order = np.random.default_rng(1).permutation(200).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, line in zip(order, pool.map(lines.__getitem__, order)):
            file, number = ("a.jsonl", i + 3) if i < 150 else ("b.jsonl", i - 149)
            assert line == (texts[i], f"{tmp_path / file} line {number}")
    for index in (-1, 200):
        with pytest.raises(IndexError):
            lines[index]


def test_lines_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no JSONL file in .*correct source"):
        JsonLines(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="a.jsonl: the JSONL file has no lines"):
        JsonLines(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b"x" * 50)
    monkeypatch.setattr("data_pipelines.lines.MAX_LINE_BYTES", 20)
    with pytest.raises(ValueError, match="a.jsonl line 2: line of 50 bytes is over the limit"):
        JsonLines(tmp_path)[1]


def test_lines_are_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.lines._CHUNK", 7)
    texts = [bytes([ord("a") + i]) * (i % 9 + 1) for i in range(26)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(texts))
    lines = JsonLines(tmp_path)
    assert [lines[i].data for i in range(len(lines))] == texts
    (tmp_path / "a.jsonl").write_bytes(b"\r\n" + b"\r\n\r\n".join(texts) + b"\r\n\r\n")    # as on Windows
    lines = JsonLines(tmp_path)
    assert [lines[i].data for i in range(len(lines))] == [text + b"\r" for text in texts]


def test_rows_of_any_columns_and_their_places(tmp_path):
    images = [[bytes([i]), bytes([i, i])] for i in range(5)]
    texts = [[["x"]], None, [[]], [["y", None]], []]
    for name, rows in (("a.parquet", slice(3)), ("sub/b.parquet", slice(3, None))):
        write_table(tmp_path / name, {"image_list": images[rows], "instruction_list": texts[rows]})
    table = ParquetRows(tmp_path, {"instruction_list": "list<list<string>>", "image_list": "list<binary>"})
    assert [table[i].values for i in range(len(table))] == list(zip(texts, images))  # in the order asked for
    assert table[2].place == f"{tmp_path}/a.parquet row 2"
    assert table[3].place == f"{tmp_path}/sub/b.parquet row 0"


@pytest.mark.parametrize("how", ["page checksums", "recorded digests"])
def test_one_flipped_byte_of_a_table_is_noticed(tmp_path, how):
    """Anywhere in the file: an error that names it, or the same rows; never other rows."""
    columns, path = {"image": "binary", "captions": "string"}, tmp_path / "a.parquet"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 300), np.uint8)
    write_table(path, {"image": [row.tobytes() for row in pixels], "captions": [CAPTIONS] * 4},
                write_page_checksum=how == "page checksums")
    if how == "recorded digests":
        digest = file_digest(path)._asdict()
        (tmp_path / DIGESTS).write_text(json.dumps({"files": {path.name: digest}}))
    content, rows, noticed = path.read_bytes(), [ParquetRows(tmp_path, columns)[i] for i in range(4)], 0
    places = range(4, len(content), 7)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x80]) + content[place + 1:])
        try:
            table = ParquetRows(tmp_path, columns)
            assert [table[i] for i in range(4)] == rows, f"byte {place}"
        except ValueError as error:
            assert "a.parquet" in str(error)
            noticed += 1
    assert noticed > len(places) / 3


def test_columns_of_another_type_are_named(tmp_path):
    struct = pyarrow.struct([("bytes", pyarrow.binary())])
    write_table(tmp_path / "train" / "t2i" / "a.parquet", {"image": [{"bytes": b"p"}], "captions": [CAPTIONS]},
                types={"image": struct, "captions": pyarrow.large_string()})
    with pytest.raises(ValueError, match="a.parquet: column 'image' holds struct.*; expected binary"):
        open_source(data_config(source=str(tmp_path)), GroupConfig("t2i", kind="text_to_image"))


def test_bytes_that_are_no_text_are_named(tmp_path):
    broken = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"image": pyarrow.array([b"p"]), "captions": broken})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet row 0: the text is damaged .not UTF-8"):
        ParquetRows(tmp_path, {"image": "binary", "captions": "string"})[0]


def test_sources_of_every_kind(tmp_path):
    groups = write_kinds(tmp_path)
    config = data_config(source=str(tmp_path), groups=groups)
    for group in groups:
        source = open_source(config, group)
        assert len(source) == 12 and len(source.digest) == 64
        record = source[11]
        assert record.mode == group.name and record.place.startswith(str(tmp_path / "train" / group.name))
        assert all(part.place.startswith(record.place) for part in record.parts)
    digest = source.digest
    with open(tmp_path / "train" / "vision_language" / "a.jsonl", "a") as file:
        file.write("{}\n")
    assert open_source(config, groups[-1]).digest != digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("actual", KINDS)
def test_another_kind_is_refused_with_the_one_that_fits(tmp_path, kind, actual):
    write_kinds(tmp_path, count=1)
    group = GroupConfig("a", kind=kind, folder=actual)
    if kind == actual:
        assert len(open_source(data_config(source=str(tmp_path)), group)) == 1
        return
    with pytest.raises(ValueError, match=f"{actual}.*is of kind '{kind}', which needs .* kind to '{actual}'"):
        open_source(data_config(source=str(tmp_path)), group)


def test_a_mixture_of_every_kind_fills_packs_as_planned(tmp_path):
    groups = write_kinds(tmp_path)
    config = data_config(source=str(tmp_path), groups=groups, text_tokens=600, vit_tokens=200,
                         latent_tokens=200, images=20, vae_dropout=0.3, text_dropout=0.1)
    packs, seen = Packs(config, tokenizer()), set()
    for i in range(20):
        plan, pack = packs.planner[i], packs[i]
        used = [np.count_nonzero(rows.last >= 0) for rows in (pack.text_rows, pack.vit_rows, pack.latent_rows)]
        assert [*used, np.count_nonzero(pack.image_height)] == list(plan.cost)
        seen |= {entry.group for entry in plan.entries}
    assert seen == set(KINDS)
