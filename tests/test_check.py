"""`check` finds every planted fault, names its place, and writes digests of what is good only."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_cases import conversation, data_config, image_part, tokenizer, write_data_set, write_rows
from data_pipelines.build import build
from data_pipelines.check import Checked, Wish, check, describe
from data_pipelines.config import BuildConfig, GroupConfig
from data_pipelines.conversion import convert
from data_pipelines.digests import DIGESTS
from data_pipelines.faults import find_cause
from data_pipelines.layout import find_groups
from data_pipelines.pipeline import Packs
from kind_cases import KINDS, picture, write_kinds, write_table

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = data_config(groups=(GroupConfig("full"), GroupConfig("think")))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """`source`, the data set `built` from it, and `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("check")
    write_data_set(folder / "source", counts={"full": 9, "think": 6})
    tokenizer().save(str(folder / "tokenizer.json"))
    convert(folder / "source", out=folder / "built", config=CONFIG, tokenizer=str(folder / "tokenizer.json"),
            workers=1, shard_mib=0)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> pathlib.Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def look(folder: pathlib.Path, **wish) -> dict[str, Checked]:
    return check(folder, Wish(CONFIG, **wish), workers=1)


def faults(folder: pathlib.Path, **wish) -> list[str]:
    return [fault for group in look(folder, **wish).values() for fault in group.faults]


def flip(file: pathlib.Path, position: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])


@pytest.mark.parametrize("name", ["source", "built"])
def test_counts_of_what_is_good(made, name):
    found = look(made / name, tokenizer=str(made / "tokenizer.json"))
    assert list(found) == ["train/full", "train/think"] and not faults(made / name)
    full, think = found.values()
    assert (full.counts["records"], full.counts["parts"], full.counts["images"]) == (9, 27, 9)
    assert (think.counts["records"], think.counts["parts"], think.counts["images"]) == (6, 12, 0)
    assert full.counts["latent"] == 9 * 4 and think.counts["latent"] == 0
    lines = list(describe(found))
    assert lines[0].startswith("train/full: 9 records of 27 parts with 9 images, ") and len(lines) == 2


def test_digests_that_are_recorded_leave_a_data_set_what_it_was(tmp_path):
    small = BuildConfig(counts={"initial_full": 2}, num_heldout_prompts=1)
    assert build(small, out=tmp_path / "data")
    assert not faults(tmp_path / "data", write=True) and (tmp_path / "data" / "digests.json").is_file()
    assert not build(small, out=tmp_path / "data")    # as it is: nothing is built again, or refused


def test_a_record_that_opens_with_the_system_prompt_is_found(tmp_path):
    answer = {"role": "assistant", "content": [{"type": "text", "content": "x"}]}
    rows = [[{"role": "user", "content": words}, answer] for words in ("go", "think first")]
    write_rows(tmp_path / "train" / "full" / "0.parquet", rows)
    wish = Wish(dataclasses.replace(CONFIG, system_prompt="think first"))
    [found] = check(tmp_path, wish, workers=1)["train/full"].faults
    assert "row 1: the record opens with the system prompt itself" in found
    with pytest.raises(ValueError, match="nowhere.txt"):    # no fault of the records
        check(tmp_path, Wish(dataclasses.replace(CONFIG, system_prompt="@nowhere.txt")), workers=1)


def test_workers_find_the_same(copy):
    flip(copy / "source" / "train" / "full" / "0000.parquet", 200)
    assert check(copy / "source", Wish(CONFIG), workers=2) == look(copy / "source")


def test_planted_faults_of_records(tmp_path):
    rng = np.random.default_rng(0)
    images = {name: image_part(rng, need_loss=True) for name in ("truncated", "text", "large")}
    images["truncated"]["content"] = images["truncated"]["content"][:400]
    images["text"]["content"] = "bm8gaW1hZ2U="
    images["large"] = image_part(rng, side=90, need_loss=True)
    wrap = lambda *parts: [{"role": "user", "content": "a"}, {"role": "assistant", "content": list(parts)}]
    think = {"type": "text", "content": "a b"}
    rows = [conversation(rng, "full"), "[", [{"role": "tool", "content": "x"}], wrap(think, {"type": "video"}),
            wrap(think, images["truncated"]), wrap(images["text"], think, images["truncated"]),
            wrap(think, image_part(rng)), wrap(images["large"]), wrap({"type": "text", "content": " "}),
            wrap({"type": "text", "content": "circle " * 200})]
    path = write_rows(tmp_path / "full" / "a.parquet", rows)
    config = data_config(max_image_pixels=80 * 80, groups=(GroupConfig("full"),))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = check(tmp_path, Wish(config, str(tmp_path / "tokenizer.json")), workers=1)["full"]
    wanted = ["row 1: the conversation is not JSON", "row 2, turn 0: unknown role 'tool'",
              "row 3, turn 1, part 1: a part must be", "row 4, turn 1, part 1: the image does not decode",
              "row 5, turn 1, part 0: not a readable", "row 5, turn 1, part 2: the image does not decode",
              "row 6, turn 1, part 1: the image has none of the flags",
              "row 7, turn 1, part 0: image of 90 x 90 is over the limit",
              "row 8, turn 1, part 0: the text is empty", "row 9: the record fits no pack (text "]
    assert len(found.faults) == len(wanted)
    for fault, start in zip(found.faults, wanted, strict=True):
        assert fault.startswith(f"{path} {start}")
    text = "\n".join(describe({"full": found}))
    assert "3 faults, cause image:" in text and "1 faults, cause role:" in text
    assert all(fault in text for fault in found.faults)


def test_planted_faults_of_files(tmp_path):
    write_data_set(tmp_path, counts={"full": 30})
    folder = tmp_path / "train" / "full"
    look(tmp_path, write=True)
    assert (tmp_path / DIGESTS).is_file() and not faults(tmp_path)
    (folder / "0002.parquet").write_bytes((folder / "0000.parquet").read_bytes())
    data = (folder / "0000.parquet").read_bytes()
    flip(folder / "0000.parquet", 200)         # in the first row group
    flip(folder / "0000.parquet", len(data) - 60)   # in the footer
    flip(folder / "0001.parquet", 200)
    found = faults(tmp_path)
    assert len(found) == 3
    for fault, wanted in zip(found, ["0000.parquet: the footer is not", "0001.parquet: rows 0 to 3 are damaged",
                                     "0002.parquet is not listed in"], strict=True):
        assert wanted in fault
    (folder / "0001.parquet").unlink()
    assert any("lists 0001.parquet, which does not exist" in fault for fault in faults(tmp_path))


def test_planted_faults_of_a_built_data_set(copy):
    folder = copy / "built" / "train" / "full"
    shards = sorted(folder.glob("*-of-*"))
    flip(shards[0], 66_000)        # padding: harmless, but not what was built
    flip(folder / "features.json", 5)
    flip(folder / "costs.npz", 100)
    (copy / "built" / "train" / "think" / "new.txt").write_text("?")
    found = faults(copy / "built")
    for wanted in (shards[0].name, "features.json", "costs.npz", "new.txt is not listed"):
        assert any(wanted in fault for fault in found), wanted
    shards[1].write_bytes(shards[1].read_bytes()[:70_000])
    assert any(f"{shards[1].name} has 70000 bytes" in fault for fault in faults(copy / "built"))
    shards[1].unlink()
    assert any(f"lists {shards[1].name}, which does not exist" in fault for fault in faults(copy / "built"))


@pytest.mark.parametrize("is_configured", [True, False])
def test_bagels_own_kinds(tmp_path, is_configured):
    """Told by the configuration, or by columns and JSONL."""
    groups = write_kinds(tmp_path)
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    config = data_config(source=str(tmp_path), groups=groups if is_configured else (GroupConfig("other"),))
    wish = Wish(config, str(tmp_path / "tokenizer.json"), write=True)
    found = check(tmp_path, wish, workers=1)
    assert list(found) == [f"train/{kind}" for kind in sorted(KINDS)]
    for kind in KINDS:
        counts = found[f"train/{kind}"].counts
        assert not found[f"train/{kind}"].faults and counts["records"] == 12 and counts["images"] >= 12
        assert (counts["vit"] > 0) == (kind != "text_to_image")
        assert (counts["latent"] > 0) == (kind != "vision_language")
    assert not check(tmp_path, wish._replace(write=False), workers=1)["train/editing"].faults


def test_planted_faults_of_bagels_own_kinds(tmp_path):
    write_kinds(tmp_path, count=1)
    folders = {kind: tmp_path / "train" / kind for kind in KINDS}
    good, cut = picture(20, 20), picture(20, 20)[:60]
    write_table(folders["text_to_image"] / "a.parquet", {
        "image": [good, cut, good, None], "captions": ["{", '{"a": "b"}', '{"a": " "}', '{"a": "b"}']})
    write_table(folders["editing"] / "a.parquet", {
        "image_list": [[good], [good, cut], [good, good]], "instruction_list": [[["a"]], [["a"]], [[], ["b"]]]})
    lines = ["{", '{"conversations": [{"from": "bot", "value": "a"}]}', '{"conversations": []}',
             '{"image": "../a.png", "conversations": [{"from": "human", "value": "<image>"}]}',
             '{"image": "cut.png", "conversations": [{"from": "human", "value": "<image>"},'
             ' {"from": "gpt", "value": "a"}]}']
    (folders["vision_language"] / "a.jsonl").write_text("\n".join(lines))
    (folders["vision_language"] / "images" / "cut.png").write_bytes(cut)
    wanted = {
        "text_to_image": ["row 0, captions: the value is not JSON", "row 1, image: the image does not decode",
                          "row 2, caption 'a': the text is empty", "row 3, image: an image must be bytes"],
        "editing": ["row 0, image_list: an editing record needs", "row 1, image 1: the image does not decode",
                    "row 2, instruction_list: 2 images need 1 lists"],
        "vision_language": ["line 1: the line is not JSON", "line 2, turn 0: unknown role 'bot'",
                            "line 3: conversations must be a list",
                            "line 4, image 0 ('../a.png'): the path must",
                            "line 5, image 0 ('cut.png'): the image does not decode"]}
    found = check(tmp_path, Wish(CONFIG, write=True), workers=1)
    for kind, sentences in wanted.items():
        faults = found[f"train/{kind}"].faults
        assert len(faults) == len(sentences), faults
        for fault, sentence in zip(faults, sentences, strict=True):
            assert fault.startswith(f"{folders[kind]}/a.") and sentence in fault
    assert not found["train/conversation"].faults and not (tmp_path / DIGESTS).exists()


def test_bit_flips_of_bagels_own_kinds_are_found_by_check_and_training(tmp_path):
    groups = write_kinds(tmp_path)
    assert not any(each.faults for each in check(tmp_path, Wish(CONFIG, write=True), workers=1).values())
    for group in groups[1:]:
        file = next((tmp_path / "train" / group.name).glob("a.*"))
        sound = file.read_bytes()
        flip(file, 9)
        (faults,) = (each.faults for each in look(tmp_path).values() if each.faults)
        assert {find_cause(fault) for fault in faults} <= {"damage", "json", "form"}
        assert any(str(file) in fault and "damaged" in fault for fault in faults)
        with pytest.raises(ValueError, match=f"{file.name}.*damaged"):
            Packs(data_config(source=str(tmp_path), groups=(group,)), tokenizer())
        file.write_bytes(sound)
    # A group whose files are not those of its kind is a fault, not a crash.
    swapped = data_config(groups=(GroupConfig("editing", kind="vision_language"),
                                  GroupConfig("vision_language", kind="editing")))
    found = check(tmp_path, Wish(swapped), workers=1)
    assert "which is read from JSONL" in found["train/editing"].faults[0]
    assert "which is read from parquet" in found["train/vision_language"].faults[0]


def test_digests_are_renewed_on_purpose(tmp_path):
    write_data_set(tmp_path, counts={"full": 8})
    look(tmp_path, write=True)
    write_data_set(tmp_path, counts={"full": 8}, seed=1)
    assert faults(tmp_path) and not faults(tmp_path, write=True) and not faults(tmp_path)


def test_headers_alone_are_quicker_and_see_less(tmp_path):
    rng = np.random.default_rng(0)
    part = image_part(rng, need_loss=True)
    part["content"] = part["content"][:2000]
    write_rows(tmp_path / "full" / "a.parquet", [[{"role": "assistant", "content": [part]}]])
    assert faults(tmp_path) and not faults(tmp_path, decode=False)


@pytest.mark.parametrize("files, groups", [
    (["full/a.parquet", "think/a.parquet", "think/b.parquet"], ["full", "think"]),
    (["train/full/a.parquet", "heldout/full/a.parquet"], ["heldout/full", "train/full"]),
    (["full/a.parquet", "think/part1/a.parquet"], ["full", "think"]),
    (["train/full/part1/a.parquet"], ["train/full"]),
    (["full/a.parquet", ".old.partial/full/a.parquet"], ["full"]),
    (["full/a.parquet", "vlm/a.jsonl", "vlm/images/b.jsonl", "prompts.jsonl"], ["full", "vlm"]),
    (["train/vlm/a.jsonl", "train/vlm/images/x/a.parquet"], ["train/vlm"]),
    (["full/a.parquet", "full/notes.jsonl", "full/part1/notes.jsonl"], ["full"]),
    (["train/full/dataset_info.json", "train/think/dataset_info.json"], ["train/full", "train/think"]),
])
def test_layouts(tmp_path, files, groups):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [group.path for group in find_groups(tmp_path)] == groups


def test_a_mode_may_be_a_link(tmp_path):
    write_data_set(tmp_path / "disk", counts={"full": 2})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "disk" / "train")
    assert look(tmp_path / "data")["train/full"].counts["records"] == 2
    (tmp_path / "data" / "train").unlink()
    (tmp_path / "data" / "full").symlink_to(tmp_path / "disk" / "train" / "full")
    assert look(tmp_path / "data")["full"].counts["records"] == 2


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "data_pipelines.check", *arguments], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_command(copy):
    source = str(copy / "source")
    done = run(source, "--write", "--config=configs/irgl_stage1.py", f"--tokenizer={copy / 'tokenizer.json'}")
    assert done.returncode == 0 and "15 records, 0 faults" in done.stdout, done.stderr
    flip(copy / "source" / "train" / "full" / "0000.parquet", 200)
    done = run(source, "--workers=2")
    assert done.returncode == 1 and "1 faults, cause damage" in done.stdout
    assert done.stderr.endswith(f"error: 1 faults in {source!r}, listed above\n")
    for arguments, message in ([("nowhere",), "'nowhere' is no folder"], [(), "--dir"]):
        done = run(*arguments)
        assert done.returncode == 1 and message in done.stderr
