"""Broken records: counted by cause, named once, replaced by what fits, and too many end the run."""

import base64
import dataclasses
import json

import numpy as np
import pytest

from data_cases import conversation, data_config, encode_image, tokenizer, write_rows
from data_pipelines.batch import INF
from data_pipelines.config import GroupConfig
from data_pipelines.faults import CAUSES, BadRecords, Fault, find_cause
from data_pipelines.pipeline import Packs, make_iterator
from data_pipelines.planning import Entry
from data_pipelines.samples import Cost
from kind_cases import write_kinds

TOKENIZER = tokenizer()
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def with_image(data: bytes) -> list[dict]:
    content = base64.b64encode(data).decode()
    return [{"role": "user", "content": "go"},
            {"role": "assistant", "content": [{"type": "image", "content": content, "need_loss": True}]}]


HEADER = with_image(b"no image at all")
PIXELS = with_image(encode_image(NOISE)[:1500])     # whole header, broken pixels: known only when it is read
BROKEN = {                                         # cause -> a record, and what is said of it
    "json": ("[{", "row 4: the conversation is not JSON"),
    "role": ([{"role": "poet", "content": "x"}], "row 4, turn 0: unknown role 'poet'"),
    "flag": ([{"role": "assistant", "content": [{**HEADER[1]["content"][0], "need_loss": False},
                                               {"type": "text", "content": "x"}]}],
             "row 4, turn 0, part 0: the image has none of the flags"),
    "form": ([{"role": "user"}], "row 4, turn 0: a turn must be"),
    "image": (HEADER, "row 4, turn 1, part 0: not a readable image"),
    "size": (with_image(encode_image(np.zeros((8, 600, 3), np.uint8))), "row 4, turn 1, part 0: .*4096 pixels"),
    "length": ([{"role": "user", "content": "red " * 400, "need_loss": True}],
               "row 4: the record fits no pack .text .* > 160"),
    "text": ([{"role": "user", "content": " "}], "row 4, turn 0: .*empty"),
}


def data_with(folder, *rows, good=4, kind="full", **fields):
    """Some good records and some others, in one group."""
    rng = np.random.default_rng(0)
    rows = [*(conversation(rng, kind) for _ in range(good)), *rows]
    write_rows(folder / "train" / "full" / "0000.parquet", rows)
    return data_config(source=str(folder), groups=(GroupConfig("full"),), **fields)


@pytest.mark.parametrize("cause", BROKEN)
def test_every_cause_is_told_counted_and_ends_a_run_that_allows_none(tmp_path, caplog, cause):
    row, sentence = BROKEN[cause]
    config = data_with(tmp_path, row, max_image_pixels=4096)
    with pytest.raises(ValueError, match=f"{sentence}.*bad record 1 of group 'full', more than the 0 of 5 .*"
                                         "raise data.max_bad_share"):
        make_iterator(config, TOKENIZER)
    iterator = make_iterator(dataclasses.replace(config, max_bad_share=0.2), TOKENIZER)
    assert iterator.counters == {"bad_records": 1, f"bad_{cause}": 1,
                                 "oversize_records": int(cause == "length")}
    assert {entry.index for i in range(40) for entry in iterator.packs.planner[i].entries} == {0, 1, 2, 3}
    assert caplog.text.count("row 4") == 1
    iterator.close()


def test_an_image_beside_jsonl_that_changed_its_size_is_a_bad_record(tmp_path):
    """Costs are kept, and no digest knows the images: the plan has room for another one."""
    group = next(group for group in write_kinds(tmp_path) if group.kind == "vision_language")
    config = data_config(source=str(tmp_path), groups=(group,), index_dir=str(tmp_path / "index"))
    make_iterator(config, TOKENIZER).close()
    for name, size in ((3, 14), (5, 80)):
        changed = encode_image(np.zeros((size, size, 3), np.uint8))
        (tmp_path / "train" / "vision_language" / "images" / f"{name}.png").write_bytes(changed)
    iterator = make_iterator(dataclasses.replace(config, max_bad_share=0.5), TOKENIZER)
    for _ in range(6):
        next(iterator)
    assert iterator.counters == {"bad_records": 2, "bad_damage": 2, "oversize_records": 0}
    iterator.close()
    iterator = make_iterator(config, TOKENIZER)
    with pytest.raises(ValueError, match="line .*: the record takes Cost.*, planned were .*the cost tables"):
        for _ in range(6):
            next(iterator)
    iterator.close()


def test_damage_is_a_cause_and_all_causes_are_tried():
    assert find_cause("a.parquet: rows 0 to 3 are damaged (hash); restore the file") == "damage"
    assert set(BROKEN) | {"damage"} == set(CAUSES)


@pytest.mark.parametrize("sentence, cause", [
    ("a row 1, turn 0: unknown flag 'need_los'; use need_loss", "flag"),
    ("a row 1, turn 0: need_vae is 'yes'; use true or false", "flag"),
    ("a row 1, turn 0: unknown part type 'video'; use text or image", "form")])
def test_what_is_no_flag_is_no_cause_of_flags(sentence, cause):
    assert find_cause(sentence) == cause


def test_an_oversize_record_may_be_dropped_at_will(tmp_path):
    config = data_with(tmp_path, BROKEN["length"][0], oversize="drop")
    iterator = make_iterator(config, TOKENIZER)
    assert iterator.counters == {"bad_records": 0, "oversize_records": 1}
    iterator.close()
    long = dataclasses.replace(config, oversize="bad", text_tokens=4096, max_tokens_per_record=300)
    with pytest.raises(ValueError, match="tokens .* > max_tokens_per_record 300"):
        make_iterator(long, TOKENIZER)


def test_the_allowance_is_a_share_of_each_group(caplog):
    bad = BadRecords({"large": 3000, "small": 900}, 0.001)
    for i in range(3):
        bad.add(Fault("large", f"file row {i}: the image does not decode"))
        bad.add(Fault("large", f"file row {i}: the image does not decode"))  # met again
    assert bad.counts == {"bad_records": 3, "bad_image": 3}
    assert caplog.text.count("row 1") == 1
    with pytest.raises(ValueError, match="file row 9: .*record 4 of group 'large', more than the 3 of 3000"):
        bad.add(Fault("large", "file row 9: the text is empty"))
    with pytest.raises(ValueError, match="bad record 1 of group 'small', more than the 0 of 900"):
        bad.add(Fault("small", "file row 0: the text is empty"))


# ---- found while reading ----------------------------------------------------------------------

def test_a_search_for_what_can_stand_in_ends_with_the_run(tmp_path, monkeypatch):
    """Each record opens with the system prompt, which is known only when it is read: no pack reads them all."""
    text = {"role": "assistant", "content": [{"type": "text", "content": "x"}]}
    config = data_with(tmp_path, *[[{"role": "user", "content": "go"}, text]] * 200, good=0, max_bad_share=0.02)
    packs = Packs(dataclasses.replace(config, system_prompt="go"), TOKENIZER)
    entries = len(packs.planner[0].entries)
    assert len(packs.load(0).faults) == 4 + entries    # four may be bad; each of the others is read once
    with pytest.raises(ValueError, match="opens with the system prompt itself.*more than the 4 of 200"):
        next(make_iterator(packs.config, TOKENIZER))


def test_broken_pixels_end_the_iteration_with_their_name(tmp_path):
    iterator = make_iterator(data_with(tmp_path, PIXELS), TOKENIZER)
    with pytest.raises(ValueError, match="row 4, turn 1, part 0: .* does not decode.*max_bad_share 0.001"):
        for _ in range(10):
            next(iterator)
    iterator.close()


def test_every_record_of_a_damaged_piece_counts(tmp_path, caplog):
    """A row group that cannot be read is as many lost records as it has rows, not one."""
    config = data_with(tmp_path, good=12, kind="think", max_bad_share=0.4)
    path = tmp_path / "train" / "full" / "0000.parquet"
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    iterator = make_iterator(config, TOKENIZER)
    assert iterator.counters == {"bad_records": 4, "bad_damage": 4, "oversize_records": 0}
    assert [caplog.text.count(f"row {row} cannot be read") for row in range(5)] == [1, 1, 1, 1, 0]
    iterator.close()
    with pytest.raises(ValueError, match="row 2 cannot be read: .* rows 0 to 3 are damaged.*more than the 2"):
        make_iterator(dataclasses.replace(config, max_bad_share=0.2), TOKENIZER)


def test_a_broken_record_is_replaced_by_the_next_that_fits(tmp_path):
    """Rows: 0 too large for the room, 1 fits, 2 broken (also fits), 3 too large, 4 broken, 5 too large."""
    image = encode_image(NOISE)
    large = with_image(encode_image(np.zeros((64, 64, 3), np.uint8)))
    small = [{"role": "user", "content": "a star"}, *with_image(image)[1:]]
    write_rows(tmp_path / "train" / "full" / "0.parquet", [large, small, PIXELS, large, PIXELS, large])
    config = data_config(source=str(tmp_path), max_bad_share=1.0, text_tokens=64, lookahead=1)
    iterator = make_iterator(config, TOKENIZER)
    packs = iterator.packs
    index = next(i for i in range(99) if Entry("full", 0, 4) in packs.planner[i].entries)
    pack, position = packs.planner[index], packs.planner[index].entries.index(Entry("full", 0, 4))
    batch, faults = packs.load(index)
    assert {fault.reason.split(":")[0].split("row ")[1] for fault in faults} <= {
        "4, turn 1, part 0", "2, turn 1, part 0"} and any("row 4" in fault.reason for fault in faults)
    samples = sorted(set(batch.text_rows.first[batch.text_rows.first != INF].tolist()))
    assert len(samples) == len(pack.entries)
    first = samples[position]
    ids = batch.text_ids[batch.text_rows.first == first]
    assert TOKENIZER.decode(ids.tolist()) == "a star"
    used = Cost((batch.text_rows.order != INF).sum(), (batch.vit_rows.order != INF).sum(),
                (batch.latent_rows.order != INF).sum(), (batch.image_height > 0).sum())
    assert all(one <= planned for one, planned in zip(used, pack.cost))
    iterator.close()


def test_without_a_record_that_fits_the_room_is_padding(tmp_path):
    large = with_image(encode_image(np.zeros((64, 64, 3), np.uint8)))
    write_rows(tmp_path / "train" / "full" / "0.parquet", [large, PIXELS])
    iterator = make_iterator(data_config(source=str(tmp_path), max_bad_share=1.0, latent_tokens=17), TOKENIZER)
    packs = iterator.packs
    index = next(i for i in range(99) if {entry.index for entry in packs.planner[i].entries} == {1})
    batch, faults = packs.load(index)
    assert {fault.group for fault in faults} == {"full"}
    assert (batch.text_rows.order == INF).all() and (batch.latent_rows.order == INF).all()
    assert not batch.text_weight.any() and not batch.latent_weight.any()
    iterator.close()


def test_all_processes_and_epochs_replace_alike_and_count_once(tmp_path, caplog):
    config = data_with(tmp_path, PIXELS, HEADER, max_bad_share=0.4)
    iterator = make_iterator(config, TOKENIZER)
    assert iterator.counters["bad_records"] == 1  # the header, known from planning
    batches = [next(iterator) for _ in range(12)]
    assert iterator.counters == {"bad_records": 2, "bad_image": 2, "oversize_records": 0}
    assert caplog.text.count("row 4, turn 1, part 0") == 1  # though met in every epoch
    iterator.close()
    shares = [make_iterator(config, TOKENIZER, rows=rows) for rows in ([0, 1], [2, 3])]
    for batch in batches[:6]:
        parts = [next(share) for share in shares]
        joined = np.concatenate([part.latent_pixels for part in parts])
        np.testing.assert_array_equal(joined, batch.latent_pixels)
    for share in shares:
        share.close()


def test_an_error_that_is_no_records_fault_is_not_swallowed(tmp_path, monkeypatch):
    iterator = make_iterator(data_with(tmp_path, max_bad_share=1.0), TOKENIZER)
    monkeypatch.setattr("data_pipelines.pipeline.realise", lambda *args, **kwargs: 1 / 0)
    iterator.set_state(7)
    with pytest.raises(ZeroDivisionError):
        next(iterator)
    iterator.close()


def test_reasons_are_sentences_that_json_keeps():
    """Cost tables and worker messages carry a fault as text alone."""
    fault = Fault("full", BROKEN["role"][1])
    assert Fault(*json.loads(json.dumps(fault))) == fault and find_cause(fault.reason) == "role"
