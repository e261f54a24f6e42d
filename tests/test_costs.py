"""Cost tables come from where they are cheapest, and what fits no pack is found for any budgets."""

import dataclasses

import numpy as np
import pytest

from data_cases import FakeTokenizer, data_config
from data_pipelines.config import GroupConfig
from data_pipelines.costs import CostTable, find_oversize, measure_costs, read_costs
from data_pipelines.faults import BadRecords
from data_pipelines.records import Kind, Record, TextPart
from data_pipelines.stored_costs import describe_costs

GROUP = GroupConfig("full")


class Texts:
    """A source of one text a record; counts how often it is read."""

    digest = "texts"

    def __init__(self, *lengths: int):
        self._lengths, self.reads = lengths, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Record:
        self.reads += 1
        if not self._lengths[index]:
            raise ValueError(f"file row {index}: the text is empty")
        return Record((TextPart("x" * self._lengths[index], False, "part"),), "full", f"file row {index}")


class Built(Texts):
    """As above, with costs of its own, measured under `config`."""

    def __init__(self, config, *lengths: int):
        super().__init__(*lengths)
        self._key = describe_costs(config, GROUP, FakeTokenizer())

    def stored_costs(self, key):
        items = np.array([(Kind.TEXT, length + 2, 0, 0, 0) for length in self._lengths], np.int32)
        return (items, np.arange(len(self) + 1)) if key == self._key else None


def read(source, config, *, share: float = 1.0) -> CostTable:
    bad = BadRecords({"full": len(source)}, share)
    return read_costs(source, group=GROUP, config=config, tokenizer=FakeTokenizer(), bad=bad)


def text_costs(table: CostTable) -> list[int]:
    return [int(table.record(index)[:, 1].sum()) for index in range(len(table))]


def test_kept_tables_serve_other_budgets_and_no_other_transform(tmp_path):
    config, source = data_config(index_dir=str(tmp_path)), Texts(5, 0, 150, 30)
    table = read(source, config)
    assert text_costs(table) == [7, 0, 152, 32] and source.reads == 4
    assert table.bad == ("file row 1: the text is empty",) and table.oversize == ()
    again = read(source, dataclasses.replace(config, text_tokens=100))
    assert text_costs(again) == [7, 0, 0, 32] and again.bad == table.bad
    assert again.oversize == ("file row 2: the record fits no pack (text 152 > 100)",)
    assert source.reads == 5  # to name the place
    with pytest.raises(ValueError, match="row 1: the text is empty"):
        read(source, config, share=0.0)
    [path] = tmp_path.iterdir()
    read(source, dataclasses.replace(config, vit_patch=7))
    assert source.reads == 9
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="the cost table is damaged .*delete it"):
        read(source, config)


def test_a_table_that_cannot_be_kept_is_told_before_records_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    source = Texts(5, 30)
    with pytest.raises(ValueError, match="the cost table cannot be written .Not a directory.*data.index_dir"):
        read(source, data_config(index_dir=str(tmp_path / "file" / "index")))
    assert not source.reads


def test_a_data_set_that_brings_its_costs_is_not_read():
    config = data_config()
    source = Built(config, 5, 500, 30)
    dropped = read(source, dataclasses.replace(config, oversize="drop"))
    assert text_costs(dropped) == [7, 0, 32] and source.reads == 0
    assert dropped.oversize == ("record 1 of group 'full': the record fits no pack (text 502 > 160)",)
    other = dataclasses.replace(config, vit_patch=7, text_tokens=600)
    assert text_costs(read(source, other)) == [7, 502, 32] and source.reads == 3


def test_more_oversize_records_than_allowed_end_the_run():
    with pytest.raises(ValueError, match="row 0: the record fits no pack .text 302 > 160.; raise the budgets"):
        read(Texts(300, 20), data_config(), share=0.0)


@pytest.mark.parametrize("kind, fits", [("conversation", False), ("text_to_image", True)])
def test_of_captions_only_the_one_that_is_drawn_counts(kind, fits):
    items = [(Kind.TEXT, 90, 0, 0, 0), (Kind.TEXT, 100, 0, 0, 0), (Kind.NOISED, 2, 0, 16, 1)]
    table, group = CostTable(np.array(items, np.int32), np.array([0, 3])), GroupConfig("full", kind=kind)
    found = list(find_oversize(table, group=group, config=data_config()))
    assert found == ([] if fits else [(0, "text 192 > 160")])
    short = data_config(max_tokens_per_record=100)
    [(index, reason)] = find_oversize(table, group=group, config=short)
    assert index == 0 and f"tokens {118 if fits else 208} > max_tokens_per_record 100" in reason


def test_tables_without_some_records():
    table = CostTable(np.arange(25, dtype=np.int32).reshape(5, 5), np.array([0, 2, 2, 4, 5]), ("bad",))
    left = table.without([0, 3], ("large", "larger"))
    assert len(left) == 4 and left.bad == ("bad",) and left.oversize == ("large", "larger")
    assert [left.record(index).tolist() for index in range(4)] == [[], [], table.record(2).tolist(), []]


def test_measuring_alone_keeps_what_fits_no_pack():
    bad = BadRecords({"full": 1}, 0.0)
    table = measure_costs(Texts(900), group=GROUP, config=data_config(), tokenizer=FakeTokenizer(), bad=bad)
    assert text_costs(table) == [902]
