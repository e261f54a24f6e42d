"""The six modes against the paper's figure: which parts in which order, where the loss is, how images enter."""

import itertools
import json

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation_cases import picture
from data_pipelines.curation.compose import IMPROVING, INITIAL, MODES, compose
from data_pipelines.curation.material import Material, Picture, Round, Words
from data_pipelines.curation.writing import SCHEMA, ModeWriter, Row
from data_pipelines.records import ImagePart, parse_conversation
from data_pipelines.sources import ParquetRows

FIRST, BETTER = Picture.drawn(picture("first")), Picture.drawn(picture("better"))
MATERIAL = Material(Words("SYSTEM", "HOW TO THINK", "HOW TO IMPROVE"), "PROMPT", BETTER, "THOUGHT",
                    Round("FIRST THOUGHT", FIRST, {}), "REFLECTION")
# (text or image, need_loss, need_vae, need_vit); a text has no other flags. From the method's figure: what is
# learnt burns, what is looked at enters as VAE and as ViT.
GIVEN, LEARNT, SEEN, DRAWN = (False,), (True,), (False, True, True), (True, False, False)
TABLE = {
    "initial_thinking_understanding": [("SYSTEM", *GIVEN), ("PROMPT", *GIVEN), (BETTER, *SEEN),
                                       ("HOW TO THINK", *GIVEN), ("THOUGHT", *LEARNT)],
    "initial_thinking_generation": [("SYSTEM", *GIVEN), ("PROMPT", *GIVEN), ("THOUGHT", *LEARNT)],
    "initial_full": [("SYSTEM", *GIVEN), ("PROMPT", *GIVEN), ("THOUGHT", *LEARNT), (BETTER, *DRAWN)],
    "improving_thinking_understanding": [
        ("SYSTEM", *GIVEN), ("PROMPT", *GIVEN), (FIRST, *SEEN), (BETTER, *SEEN), ("HOW TO IMPROVE", *GIVEN),
        ("REFLECTION", *LEARNT)],
    "improving_thinking_generation": [
        ("SYSTEM", *GIVEN), ("PROMPT", *GIVEN), ("FIRST THOUGHT", *GIVEN), (FIRST, *SEEN),
        ("REFLECTION", *LEARNT)],
    "improving_full": [
        ("SYSTEM", *GIVEN), ("PROMPT", *GIVEN), ("FIRST THOUGHT", *GIVEN), (FIRST, *SEEN),
        ("REFLECTION", *LEARNT), (BETTER, *DRAWN)],
}


def parts_of(turns):
    record = parse_conversation(json.dumps(turns), mode="", place="")
    pictures = {FIRST.data: FIRST, BETTER.data: BETTER}
    return [(pictures[part.data], part.need_loss, part.need_vae, part.need_vit) if isinstance(part, ImagePart)
            else (part.text, part.need_loss) for part in record.parts]


def test_all_modes_are_in_the_table():
    assert list(TABLE) == list(MODES)


@pytest.mark.parametrize("mode", TABLE)
def test_a_mode_has_the_parts_of_the_figure(mode):
    assert parts_of(compose(mode, MATERIAL)) == TABLE[mode]


@pytest.mark.parametrize("mode", TABLE)
def test_without_a_system_prompt_none_opens_the_record(mode):
    bare = MATERIAL._replace(words=MATERIAL.words._replace(system_prompt=""))
    assert parts_of(compose(mode, bare)) == TABLE[mode][1:]


@pytest.mark.parametrize("mode", TABLE)
def test_what_a_mode_does_not_tell_it_does_not_need(mode):
    unneeded = {"first": None, "reflection": ""} if mode in INITIAL else {"thought": ""}
    lacking = MATERIAL._replace(**unneeded)
    assert compose(mode, lacking) == compose(mode, MATERIAL)
    missing = "thought" if mode in INITIAL else "reflection"
    with pytest.raises(ValueError, match="has no"):
        compose(mode, MATERIAL._replace(**{missing: ""}))


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="'initial_ful'"):
        compose("initial_ful", MATERIAL)
    assert MODES == INITIAL + IMPROVING


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=30), st.integers(1, 9),
       st.integers(1, 9))
def test_rows_come_back_as_they_were_written(tmp_path_factory, ids, per_file, per_group):
    folder = tmp_path_factory.mktemp("rows")
    written = [Row([{"role": "user", "content": id_}], id_, "CC0", {"n": n}) for n, id_ in enumerate(ids)]
    with ModeWriter(folder / "mode", rows_per_file=per_file, rows_per_group=per_group) as writer:
        for row in written:
            writer.add(row)
    if not ids:
        assert not (folder / "mode").exists()
        return
    source = ParquetRows(folder / "mode", dict.fromkeys(SCHEMA.names, "string"))
    read = [source[i].values for i in range(len(source))]
    assert [(json.loads(one), id_, licence, json.loads(told)) for one, id_, licence, told in read] == [
        (row.conversation, row.id, row.licence, row.provenance) for row in written]
    sizes = [[group.num_rows for group in _groups(file)] for file in source.files]
    whole = [len(ids[start:start + per_file]) for start in range(0, len(ids), per_file)]
    assert [sum(groups) for groups in sizes] == whole
    assert all(size == per_group for groups in sizes for size in groups[:-1])
    assert max(itertools.chain(*sizes)) <= per_group


def test_no_flipped_byte_is_read(tmp_path):
    with ModeWriter(tmp_path / "mode", rows_per_file=9, rows_per_group=9) as writer:
        for mode in MODES:
            writer.add(Row(compose(mode, MATERIAL), mode, "CC0", {}))
    path, = (tmp_path / "mode").iterdir()
    whole, columns = path.read_bytes(), dict.fromkeys(SCHEMA.names, "string")
    written = [ParquetRows(tmp_path / "mode", columns)[i] for i in range(len(MODES))]
    faults = 0
    for place in np.linspace(4, len(whole) - 1, 100).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        try:
            source = ParquetRows(tmp_path / "mode", columns)
            assert [source[i] for i in range(len(MODES))] == written    # what is not read, like statistics
        except ValueError:
            faults += 1
    assert faults > 30


def _groups(file):
    metadata = pyarrow.parquet.ParquetFile(file).metadata
    return [metadata.row_group(i) for i in range(metadata.num_row_groups)]


def test_a_picture_that_changes_on_the_way_is_noticed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(FIRST.data)
    read = Picture.read(path, FIRST.data)
    np.testing.assert_array_equal(read.pixels, picture("first"))
    path.write_bytes(BETTER.data)
    with pytest.raises(ValueError, match="a.png: the image was changed"):
        assert read.data
    path.unlink()
    with pytest.raises(ValueError, match="a.png: the image cannot be read any more"):
        assert read.pixels.size
