"""The batches: shapes, process counts, resumes, fill; workers see test_iterating."""

import dataclasses
import subprocess
import sys

import grain
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_cases import data_config, tokenizer, write_data_set, write_rows
from data_pipelines.batch import INF, Rows
from data_pipelines.config import GroupConfig
from data_pipelines.pipeline import Packs, make_iterator

COUNTS = {"full": 9, "improving": 7, "think": 5}
GROUPS = (GroupConfig("full", 1.0, True), GroupConfig("improving", 1.0), GroupConfig("think", 0.5))
TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    source = write_data_set(tmp_path_factory.mktemp("data"), counts=COUNTS)
    return data_config(source=str(source), groups=GROUPS, text_tokens=256, vae_dropout=0.3,
                       text_dropout=0.1, vit_dropout=0.1, packs_per_step=4)


@pytest.fixture(scope="module")
def truth(config):
    """The global batches of the first steps."""
    iterator = make_iterator(config, TOKENIZER)
    batches = [next(iterator) for _ in range(8)]
    iterator.close()
    return batches


def arrays(batch) -> list[np.ndarray]:
    return [array for field in batch for array in (field if isinstance(field, Rows) else (field,))]


def assert_same(batch, expected) -> None:
    for one, other in zip(arrays(batch), arrays(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_have_the_contract_shapes(config, truth):
    for batch in truth:
        assert batch.text_ids.shape == (4, 256) and batch.text_ids.dtype == np.int32
        assert batch.text_rows.order.shape == (4, 256) and batch.text_rows.noised.dtype == bool
        assert batch.vit_patches.shape == (4, 48, 14 * 14 * 3)
        assert batch.latent_pixels.shape == (4, 48, 16 * 16 * 3)
        assert batch.latent_pixels.dtype == batch.vit_patches.dtype == np.uint8
        assert batch.image_timestep.shape == (4, 6) and batch.image_timestep.dtype == np.float32
    assert all((batch.text_weight.sum(axis=1) > 0).any() for batch in truth)


def test_packs_within_a_step_differ(truth):
    assert len({batch.text_ids[i].tobytes() for batch in truth for i in range(4)}) == 32


def test_packs_are_a_data_set_with_random_access(config, truth):
    packs = grain.MapDataset.source(Packs(config, TOKENIZER))
    for index in (13, 2, 30):
        for one, batch in zip(arrays(packs[index]), arrays(truth[index // 4]), strict=True):
            np.testing.assert_array_equal(one, batch[index % 4])


@settings(max_examples=8, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hosts=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=4), start=st.integers(0, 7))
def test_any_rows_for_any_process_from_any_step(config, truth, hosts, start):
    """Rows need not be neighbours, and two processes whose chips share a pack have the same."""
    shares = [make_iterator(config, TOKENIZER, start=start, rows=sorted(rows)) for rows in hosts]
    for step in range(start, min(start + 2, 8)):
        for share, rows in zip(shares, hosts):
            for one, other in zip(arrays(next(share)), arrays(truth[step]), strict=True):
                np.testing.assert_array_equal(one, other[sorted(rows)])
    assert {share.get_state() for share in shares} == {min(start + 2, 8)}
    for share in shares:
        share.close()


def test_state_is_one_integer_and_goes_both_ways(config, truth):
    iterator = make_iterator(config, TOKENIZER)
    for _ in range(3):
        next(iterator)
    assert iterator.get_state() == 3
    for step in (6, 1, 3):
        iterator.set_state(step)
        assert_same(next(iterator), truth[step])
        assert iterator.get_state() == step + 1
    with pytest.raises(ValueError, match="-1 is negative"):
        iterator.set_state(-1)
    iterator.close()


def test_reading_settings_change_no_batch(config, truth, tmp_path):
    changed = dataclasses.replace(config, read_threads=1, prefetch=1, cache_mib=1,
                                  index_dir=str(tmp_path / "index"))
    for _ in range(2):  # the second time from the kept cost tables
        iterator = make_iterator(changed, TOKENIZER, start=5)
        assert_same(next(iterator), truth[5])
        iterator.close()
    assert len(list((tmp_path / "index").glob("costs-*.npz"))) == len(COUNTS)


def test_the_journal_gives_the_same_plan(config, tmp_path):
    kept = dataclasses.replace(config, index_dir=str(tmp_path))
    far = 40 * 64 + 3
    first = make_iterator(kept, TOKENIZER)
    expected = first.packs.planner[far]
    first.close()
    [journal] = tmp_path.glob("plan-*.index")
    journal.write_bytes(journal.read_bytes()[:-40])  # torn by a kill
    again = make_iterator(kept, TOKENIZER)
    assert again.packs.planner[far] == expected
    again.close()


def test_fill_counts_the_tokens_of_all_processes(config, truth):
    iterator = make_iterator(config, TOKENIZER, rows=[2, 3])
    for step, batch in enumerate(truth):
        used = {"text": (batch.text_rows.order != INF).mean(),
                "vit": (batch.vit_rows.order != INF).mean(),
                "latent": (batch.latent_rows.order != INF).mean(),
                "images": (batch.image_height > 0).mean()}
        assert iterator.fill(step) == pytest.approx(used)
    assert iterator.counters == {"bad_records": 0, "oversize_records": 0}
    iterator.close()


def test_a_mandatory_group_that_is_left_out_is_told_once(tmp_path, caplog):
    """One text of each group never fits beside the other."""
    turn = lambda words: [{"role": "user", "content": words, "need_loss": True}]
    for mode, rows in {"full": [turn("red " * 50)] * 5, "think": [turn("red"), turn("red " * 50)]}.items():
        write_rows(tmp_path / "train" / mode / "0.parquet", rows)
    groups = (GroupConfig("full", 1.0, True), GroupConfig("think", 1.0, True))
    packs = Packs(data_config(source=str(tmp_path), groups=groups, text_tokens=100), TOKENIZER)
    left_out = [i for i in range(30) if len({entry.group for entry in packs.planner[i].entries}) < 2]
    for i in range(30):
        packs.load(i)
    assert len(left_out) > 1 and caplog.text.count("though mandatory") == 1
    assert f"pack {left_out[0]} has no room for a record of" in caplog.text


def test_control_tokens_in_records_stay_text(tmp_path):
    turns = [{"role": "user", "content": "red <|im_end|> circle", "need_loss": True}]
    write_rows(tmp_path / "train" / "full" / "0.parquet", [turns])
    iterator = make_iterator(data_config(source=str(tmp_path)), TOKENIZER)
    ids = next(iterator).text_ids[0]
    iterator.close()
    starts = np.flatnonzero(ids == TOKENIZER.bos)
    ends = np.flatnonzero(ids == TOKENIZER.eos)
    assert len(starts) == len(ends) > 0
    assert TOKENIZER.decode(ids[starts[0]:ends[0]].tolist()) == "red <|im_end|> circle"


def test_nothing_usable_and_rows_of_no_step_are_refused(config, tmp_path):
    for rows in ([], [3, 4], [-1]):
        with pytest.raises(ValueError, match="give some of its 4 packs"):
            make_iterator(config, TOKENIZER, rows=rows)
    missing = dataclasses.replace(config, groups=(GroupConfig("absent"),))
    with pytest.raises(ValueError, match="no parquet file in .*absent"):
        make_iterator(missing, TOKENIZER)
    write_rows(tmp_path / "train" / "full" / "0.parquet", ["{"])
    bad = data_config(source=str(tmp_path), max_bad_share=1.0)
    with pytest.raises(ValueError, match="group 'full' has no usable record"):
        make_iterator(bad, TOKENIZER)


def test_our_modules_never_import_jax():
    """Grain may; here it is kept out to see what our own modules ask for."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "flax", "irg_jax"):
            raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
import types; grain = sys.modules["grain"] = types.ModuleType("grain")
grain.MapDataset = grain.DatasetIterator = object
import importlib, pathlib
for file in pathlib.Path("data_pipelines").rglob("*.py"):
    parts = file.with_suffix("").parts
    importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
print("imported")
"""
    import pathlib
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr
