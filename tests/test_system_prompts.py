"""A system prompt in training opens every sample, is planned for, never dropped, and known by its words."""

import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cases import FakeTokenizer, conversation, data_config, tokenizer, write_rows
from data_pipelines.batch import Rows
from data_pipelines.choices import choose_many, largest
from data_pipelines.config import DataConfig, GroupConfig, from_config_dict
from data_pipelines.costs import CostTable
from data_pipelines.pipeline import make_iterator
from data_pipelines.records import Kind, Record, TextPart
from data_pipelines.samples import Text, draw, realise
from data_pipelines.simulation import simulate
from data_pipelines.system_prompts import load_system_prompt, name_system_prompt
from plan_cases import random_tables

PROMPT, OTHER = "plan above the blue square", "plan above the blue circle"
TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same records twice: as they are, and each with PROMPT as a user's turn before it."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for mode, count in (("full", 7), ("improving", 5), ("think", 4)):
        records = [conversation(rng, mode) for _ in range(count)]
        write_rows(root / "plain" / "train" / mode / "0.parquet", records)
        write_rows(root / "opened" / "train" / mode / "0.parquet",
                   [[{"role": "user", "content": PROMPT}, *record] for record in records])
    return root


def config_of(folder, *, own: dict[str, str] | None = None, **fields) -> DataConfig:
    groups = tuple(GroupConfig(name, system_prompt=(own or {}).get(name))
                   for name in ("full", "improving", "think"))
    return data_config(source=str(folder), groups=groups, text_tokens=256, vae_dropout=0.3, vit_dropout=0.2,
                       **fields)


def batches(config: DataConfig, count: int = 4) -> list[np.ndarray]:
    iterator = make_iterator(config, TOKENIZER)
    fields = [field for _ in range(count) for field in next(iterator)]
    iterator.close()
    return [array for field in fields for array in (field if isinstance(field, Rows) else (field,))]


def test_it_is_what_a_turn_before_every_record_would_be(folders, tmp_path, caplog):
    """The same batches as of records that hold it, whether it is given as words or as a file."""
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    truth = batches(config_of(folders / "opened"))
    with caplog.at_level(logging.INFO):
        for value in (PROMPT, f"@{file}"):
            found = batches(config_of(folders / "plain", system_prompt=value))
            for array, expected in zip(found, truth, strict=True):
                np.testing.assert_array_equal(array, expected)
    assert f"system prompt of group full: own wording ({len(PROMPT)} characters)" in caplog.text
    assert "system prompt of group full: IRG" not in caplog.text


def test_a_group_may_have_its_own_or_none(folders):
    opening = TOKENIZER.encode(PROMPT)
    config = config_of(folders / "plain", own={"full": PROMPT, "think": ""}, system_prompt="look again")
    iterator = make_iterator(config, TOKENIZER)
    packs = iterator.packs
    found = {}
    for index in range(4):
        for entry in packs.planner[index].entries:
            found[entry.group] = next(item for item in packs._realise(entry) if isinstance(item, Text)).ids
    iterator.close()
    assert found["full"] == opening and found["improving"] == TOKENIZER.encode("look again")
    assert found["think"] not in (opening, TOKENIZER.encode("look again"))


def test_every_text_but_the_system_prompt_may_be_dropped():
    config, group = data_config(text_dropout=1.0, system_prompt="sys"), GroupConfig("full")
    record = Record((TextPart("prompt", False, "0"), TextPart("plan", True, "1")), "full", "record")
    kinds = np.array([Kind.SYSTEM, Kind.TEXT, Kind.TEXT])
    draws = draw(kinds, config, group=group, epoch=0, index=0)
    assert realise(record, draws, config, FakeTokenizer(), group=group) == [Text(list(b"sys"), False)]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(("conversation", "text_to_image", "editing")))
def test_it_changes_no_choice_and_costs_its_tokens_everywhere(seed, kind):
    plain = random_tables(seed, [GroupConfig("full", kind=kind)])["full"]
    opened = plain.opened_by(9)
    assert opened.opened_by(0) is opened
    is_system = opened.items[:, 0] == Kind.SYSTEM
    assert is_system.sum() == np.count_nonzero(np.diff(plain.offsets))
    for index in range(len(plain)):
        items, own = opened.record(index), plain.record(index)
        np.testing.assert_array_equal(items[items[:, 0] != Kind.SYSTEM], own)
        if len(own):
            assert items[0].tolist() == [Kind.SYSTEM, 9, 0, 0, 0]
            np.testing.assert_array_equal(largest(kind, items), largest(kind, own) + [9, 0, 0, 0])
    uniform = np.random.default_rng(seed).random(len(opened.items))
    enters = choose_many(kind, opened.items[:, 0], opened.offsets, uniform)
    assert enters[is_system].all()
    np.testing.assert_array_equal(enters[~is_system],
                                  choose_many(kind, plain.items[:, 0], plain.offsets, uniform[~is_system]))


def test_records_without_items_get_none():
    table = CostTable(np.array([(Kind.TEXT, 5, 0, 0, 0)] * 2, np.int32), np.array([0, 0, 2, 2]))
    assert table.opened_by(4).offsets.tolist() == [0, 0, 3, 3]


def test_a_record_that_holds_it_already_is_refused(folders):
    iterator = make_iterator(config_of(folders / "opened", system_prompt=PROMPT), TOKENIZER)
    with pytest.raises(ValueError, match="opens with the system prompt itself"):
        next(iterator)
    iterator.close()


def test_a_run_goes_on_with_the_same_words_alone(folders, tmp_path):
    """A file may move; other words are other batches, even with the same number of tokens."""
    for name, text in (("a", PROMPT), ("b", PROMPT), ("c", OTHER)):
        (tmp_path / name).write_text(text)
    assert len(TOKENIZER.encode(PROMPT)) == len(TOKENIZER.encode(OTHER))
    open_with = lambda value: make_iterator(config_of(folders / "plain", system_prompt=value), TOKENIZER)
    first = open_with(f"@{tmp_path / 'a'}")
    saved = first.position(2)
    moved, changed, none = (open_with(value) for value in (f"@{tmp_path / 'b'}", f"@{tmp_path / 'c'}", ""))
    moved.check_position(saved)
    with pytest.raises(ValueError, match="config.groups.full.system_prompt"):
        changed.check_position(saved)
    with pytest.raises(ValueError, match="config.groups.full.system_prompt: .* -> absent"):
        none.check_position(saved)
    for iterator in (first, moved, changed, none):
        iterator.close()


def test_workers_have_it_too(folders):
    config = config_of(folders / "plain", system_prompt=PROMPT)
    truth = batches(config, count=2)
    found = batches(dataclasses.replace(config, workers=1), count=2)
    for array, expected in zip(found, truth, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_simulated_lengths_allow_for_it():
    """Without a tokenizer, four characters are a token."""
    fields = {"source": "", "groups": {"initial_full": {}}}
    plain, opened = (simulate(from_config_dict(DataConfig, fields | {"system_prompt": text}), records=20)
                     for text in ("", "x" * 398))
    assert opened["initial_full"].items[:, 1].sum() == plain["initial_full"].items[:, 1].sum() + 20 * 102


def test_text_or_file(tmp_path):
    path = tmp_path / "system.txt"
    path.write_bytes(b"look again\n")
    assert load_system_prompt(f"@{path}") == "look again\n" and load_system_prompt("hi") == "hi"
    path.write_bytes(b"")
    refused = {f"@{path}": "is empty", "@nowhere.txt": "nowhere.txt", f"@{tmp_path}": "read as text"}
    for value, match in refused.items():
        with pytest.raises(ValueError, match=match):
            load_system_prompt(value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as text"):
        load_system_prompt(f"@{path}")
    with pytest.raises(ValueError, match="nowhere.txt"):
        make_iterator(data_config(system_prompt="@nowhere.txt"), TOKENIZER)
    assert name_system_prompt("look again") is None
