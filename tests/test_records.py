"""Conversations are read whole or refused in a sentence; files too."""

import base64
import json

import numpy as np
import pytest

from data_cases import conversation, write_rows
from data_pipelines.records import ImagePart, Limits, TextPart, parse_conversation
from data_pipelines.sources import ParquetRows

PLACE = "a.parquet row 7"


def parse(turns, **limits):
    text = turns if isinstance(turns, str) else json.dumps(turns)
    return parse_conversation(text, mode="full", place=PLACE, limits=Limits(**limits))


def assistant(*parts):
    return [{"role": "user", "content": "go"}, {"role": "assistant", "content": list(parts)}]


def image(content=base64.b64encode(b"pixels").decode(), **flags):
    return {"type": "image", "content": content, **flags}


def test_defaults_of_the_flags():
    record = parse([{"role": "user", "content": "two red circles"},
                    *assistant({"type": "text", "content": "plan"}, image())[1:],
                    {"role": "user", "content": "why?", "need_loss": True}])
    assert record.mode == "full" and record.place == PLACE
    assert record.parts == (
        TextPart("two red circles", False, f"{PLACE}, turn 0"),
        TextPart("plan", True, f"{PLACE}, turn 1, part 0"),
        ImagePart(b"pixels", False, False, False, f"{PLACE}, turn 1, part 1"),
        TextPart("why?", True, f"{PLACE}, turn 2"))


def test_flags_are_read():
    record = parse(assistant({"type": "text", "content": "plan", "need_loss": False},
                             image(need_loss=True), image(need_vae=True, need_vit=1)))
    assert [part[1:-1] for part in record.parts[1:]] == [
        (False,), (True, False, False), (False, True, True)]


def test_unknown_roles():
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go", "need_loss": True}]
    with pytest.raises(ValueError, match="row 7, turn 0: unknown role 'system'.*unknown_role"):
        parse(turns)
    assert [part.text for part in parse(turns, unknown_role="ignore").parts] == ["go"]


@pytest.mark.parametrize("turns, message", [
    ("{not json", "row 7: the conversation is not JSON"),
    ("[" * 100_000, "row 7: the conversation is not JSON"),
    ([], "row 7: the conversation must be a list of at least one turn"),
    ({"role": "user"}, "row 7: the conversation must be a list"),
    (["hello"], "turn 0: a turn must be an object"),
    ([{"role": "user"}], "turn 0: a turn must be an object with a role and a content"),
    ([{"role": "user", "content": [image()]}], "a user's content must be a string, not list"),
    ([{"role": "assistant", "content": "hi"}], "turn 0: an assistant's content must be a list"),
    ([{"role": "assistant", "content": []}], "row 7: no part has need_loss, so there is nothing to learn"),
    (assistant({"type": "text", "content": "plan", "need_loss": False}), "row 7: no part has need_loss"),
    (assistant({"type": "video", "content": ""}), "turn 1, part 0: unknown part type 'video'"),
    (assistant({"type": "text"}), "turn 1, part 0: a part must be an object"),
    (assistant({"type": "text", "content": 5}), "a text's content must be a string, not int"),
    (assistant({"type": "text", "content": "long" * 9}), "text of 36 characters is over max_text"),
    (assistant({"type": "text", "content": "a", "need_vit": True}), "unknown flag 'need_vit'"),
    (assistant(image(need_los=True)), "part 0: unknown flag 'need_los'; use need_loss, need_vae"),
    (assistant(image(need_vae="yes")), "part 0: need_vae is 'yes'; use true or false"),
    (assistant(image("a*b=")), "part 0: the image is not base64"),
    (assistant(image("abc")), "part 0: the image is not base64"),
    (assistant({"type": "text", "content": " "}), "turn 1, part 0: the text is empty"),
    ([{"role": "user", "content": ""}], "turn 0: the text is empty"),
    (assistant({"type": "text", "content": "\ud800"}), "turn 1, part 0: the text is not Unicode"),
    (assistant(image("")), "turn 1, part 0: the image is empty"),
    (assistant(image(7)), "part 0: an image's content must be a base64 string, not int"),
    (assistant(image("A" * 400)), "image of about 300 bytes is over max_image_bytes 90"),
])
def test_what_cannot_be_read_is_named(turns, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(turns, max_text_chars=30, max_image_bytes=90)
    assert str(error.value).startswith(PLACE)


# ---- files ------------------------------------------------------------------------------------

def test_rows_in_any_order_and_their_places(tmp_path):
    rows = [f"row {i}" for i in range(10)]
    first = write_rows(tmp_path / "0000.parquet", rows[:7])
    second = write_rows(tmp_path / "sub" / "0001.parquet", rows[7:])
    source = ParquetRows(tmp_path, cache_mib=1)
    assert len(source) == 10
    for i in np.random.default_rng(0).permutation(10):
        file, row = (first, i) if i < 7 else (second, i - 7)
        assert source[i] == ((rows[i],), f"{file} row {row}") and source[i].text == rows[i]
    with pytest.raises(IndexError):
        source[10]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="no parquet file in .*build the data set first"):
        ParquetRows(tmp_path)
    for content in (b"", b"PAR1 but not really PAR1"):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="bad.parquet: not a readable parquet file"):
            ParquetRows(tmp_path)
    write_rows(tmp_path / "bad.parquet", [])
    with pytest.raises(ValueError, match="bad.parquet: the parquet file has no rows"):
        ParquetRows(tmp_path)
    write_rows(tmp_path / "bad.parquet", ["x"], column="text")
    with pytest.raises(ValueError, match=r"bad.parquet: no column 'conversation'; it has .'text'"):
        ParquetRows(tmp_path)


def test_one_flipped_byte_is_noticed(tmp_path):
    """Every byte of the pages, one at a time: an error, or the same rows; never other rows."""
    rng = np.random.default_rng(0)
    rows = [json.dumps(conversation(rng, "think")) for _ in range(8)]
    path = write_rows(tmp_path / "0000.parquet", rows)
    content, noticed = path.read_bytes(), 0
    places = range(4, len(content), max(1, len(content) // 150))
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        try:
            source = ParquetRows(tmp_path)
            read = [source[i].text for i in range(len(source))]
        except ValueError as error:
            assert "0000.parquet" in str(error)
            noticed += 1
        else:
            assert read == rows, f"byte {place}"
    assert noticed > len(places) / 3


def test_null_rows_are_named(tmp_path):
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({"conversation": pyarrow.array(["a", None], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    row = ParquetRows(tmp_path)[1]
    with pytest.raises(ValueError, match="0.parquet row 1: the conversation is null"):
        parse_conversation(row.text, mode="full", place=row.place)
