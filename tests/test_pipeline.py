"""The same batches for any process count and after any resume; bad data stop or are counted."""

import base64
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_cases import conversation, data_config, encode_image, tokenizer, write_data_set, write_rows
from data_pipelines.batch import INF, Rows
from data_pipelines.config import GroupConfig
from data_pipelines.pipeline import make_iterator

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


@settings(max_examples=8, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.sampled_from((1, 2, 4)), start=st.integers(0, 7))
def test_any_process_count_from_any_step(config, truth, count, start):
    shares = [make_iterator(config, TOKENIZER, start=start, process_index=i, process_count=count)
              for i in range(count)]
    for step in range(start, min(start + 2, 8)):
        parts = [next(share) for share in shares]
        joined = [np.concatenate(stack) for stack in zip(*map(arrays, parts))]
        for one, other in zip(joined, arrays(truth[step]), strict=True):
            np.testing.assert_array_equal(one, other)
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
    [journal] = tmp_path.glob("plan-*.jsonl")
    lines = journal.read_text().splitlines()
    assert len(lines) == 2
    journal.write_text("\n".join([*lines, lines[-1][:40]]))  # torn by a kill
    again = make_iterator(kept, TOKENIZER)
    assert again.packs.planner[far] == expected
    again.close()


def test_fill_counts_the_tokens_of_all_processes(config, truth):
    iterator = make_iterator(config, TOKENIZER, process_index=1, process_count=2)
    for step, batch in enumerate(truth):
        used = {"text": (batch.text_rows.order != INF).mean(),
                "vit": (batch.vit_rows.order != INF).mean(),
                "latent": (batch.latent_rows.order != INF).mean(),
                "images": (batch.image_height > 0).mean()}
        assert iterator.fill(step) == pytest.approx(used)
    assert iterator.counters == {"bad_records": 0, "oversize_records": 0}
    iterator.close()


def test_fingerprint_names_what_decides_the_batches(config):
    def fingerprint(**fields):
        iterator = make_iterator(dataclasses.replace(config, **fields), TOKENIZER)
        iterator.close()
        return iterator.fingerprint
    reference = fingerprint()
    assert fingerprint(read_threads=2, prefetch=2) == reference
    assert len({reference, fingerprint(seed=1), fingerprint(lookahead=3),
                fingerprint(vae_dropout=0.2)}) == 4


# ---- bad data ---------------------------------------------------------------------------------

def data_with(tmp_path, *rows, **fields):
    """Four good records and some others, in one group."""
    rng = np.random.default_rng(0)
    good = [conversation(rng, "full") for _ in range(4)]
    write_rows(tmp_path / "train" / "full" / "0000.parquet", [*good, *rows])
    return data_config(source=str(tmp_path), groups=(GroupConfig("full"),), **fields)


def with_image(data: bytes) -> list[dict]:
    content = base64.b64encode(data).decode()
    return [{"role": "user", "content": "go"},
            {"role": "assistant", "content": [{"type": "image", "content": content,
                                               "need_loss": True}]}]


BROKEN_HEADER = with_image(b"no image at all")
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
BROKEN_PIXELS = with_image(encode_image(NOISE)[:1500])


def test_a_bad_record_stops_with_its_name(tmp_path):
    with pytest.raises(ValueError, match="0000.parquet row 4, turn 1, part 0: not a readable PNG"):
        make_iterator(data_with(tmp_path, BROKEN_HEADER), TOKENIZER)


def test_broken_pixels_stop_the_iteration_with_their_name(tmp_path):
    iterator = make_iterator(data_with(tmp_path, BROKEN_PIXELS), TOKENIZER)
    with pytest.raises(ValueError, match="row 4, turn 1, part 0: the image does not decode.*"
                                         "max_bad_records is 0"):
        for _ in range(10):
            next(iterator)
    iterator.close()


def test_allowed_bad_records_are_counted_and_left_out(tmp_path, caplog):
    config = data_with(tmp_path, BROKEN_PIXELS, BROKEN_HEADER, max_bad_records=2)
    iterator = make_iterator(config, TOKENIZER)
    assert iterator.counters["bad_records"] == 1  # the header, known from planning
    batches = [next(iterator) for _ in range(12)]
    assert iterator.counters["bad_records"] == 2  # the pixels once, though met in every epoch
    assert "row 4, turn 1, part 0" in caplog.text and "row 5, turn 1, part 0" in caplog.text
    iterator.close()
    assert all((batch.text_rows.order != INF).any() for batch in batches)
    shares = [make_iterator(config, TOKENIZER, process_index=i, process_count=2) for i in range(2)]
    for batch in batches[:4]:
        joined = [np.concatenate(pair) for pair in zip(*(arrays(next(share)) for share in shares))]
        for one, other in zip(joined, arrays(batch), strict=True):
            np.testing.assert_array_equal(one, other)
    for share in shares:
        share.close()


def test_oversize_records(tmp_path):
    huge = [{"role": "user", "content": "red " * 400}]
    config = data_with(tmp_path, huge)
    with pytest.raises(ValueError, match="row 4: the record fits no pack .text .* > 160.*oversize"):
        make_iterator(config, TOKENIZER)
    iterator = make_iterator(dataclasses.replace(config, oversize="drop"), TOKENIZER)
    assert iterator.counters["oversize_records"] == 1
    entries = [entry for i in range(40) for entry in iterator.packs.planner[i].entries]
    assert {entry.index for entry in entries} == {0, 1, 2, 3}
    iterator.close()
    long = dataclasses.replace(config, text_tokens=4096, max_tokens_per_record=300)
    with pytest.raises(ValueError, match="tokens .* > max_tokens_per_record 300"):
        make_iterator(long, TOKENIZER)


def test_control_tokens_in_records_stay_text(tmp_path):
    turns = [{"role": "user", "content": "red <|im_end|> circle"}]
    write_rows(tmp_path / "train" / "full" / "0.parquet", [turns])
    iterator = make_iterator(data_config(source=str(tmp_path)), TOKENIZER)
    ids = next(iterator).text_ids[0]
    iterator.close()
    starts = np.flatnonzero(ids == TOKENIZER.bos)
    ends = np.flatnonzero(ids == TOKENIZER.eos)
    assert len(starts) == len(ends) > 0
    assert TOKENIZER.decode(ids[starts[0]:ends[0]].tolist()) == "red <|im_end|> circle"


def test_nothing_usable_and_odd_process_counts_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="packs_per_step 4 does not divide by 3 processes"):
        make_iterator(config, TOKENIZER, process_count=3)
    missing = dataclasses.replace(config, groups=(GroupConfig("absent"),))
    with pytest.raises(ValueError, match="no parquet file in .*absent"):
        make_iterator(missing, TOKENIZER)
    write_rows(tmp_path / "train" / "full" / "0.parquet", ["{"])
    bad = data_config(source=str(tmp_path), max_bad_records=1)
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
import types; sys.modules["grain"] = types.ModuleType("grain")
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
