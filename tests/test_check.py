"""`check` finds every planted fault, names its place, and writes digests of what is good only."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_cases import conversation, data_config, image_part, tokenizer, write_data_set, write_rows
from data_pipelines.check import Checked, Wish, check, describe
from data_pipelines.config import GroupConfig
from data_pipelines.conversion import convert
from data_pipelines.digests import DIGESTS
from data_pipelines.layout import find_groups

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
            wrap(image_part(rng)), wrap(images["large"]), wrap({"type": "text", "content": " "}),
            wrap({"type": "text", "content": "circle " * 200})]
    path = write_rows(tmp_path / "full" / "a.parquet", rows)
    config = data_config(max_image_pixels=80 * 80, groups=(GroupConfig("full"),))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    found = check(tmp_path, Wish(config, str(tmp_path / "tokenizer.json")), workers=1)["full"]
    wanted = ["row 1: the conversation is not JSON", "row 2, turn 0: unknown role 'tool'",
              "row 3, turn 1, part 1: a part must be", "row 4, turn 1, part 1: the image does not decode",
              "row 5, turn 1, part 0: not a readable", "row 5, turn 1, part 2: the image does not decode",
              "row 6, turn 1, part 0: the image has none of the flags",
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
    (["train/full/dataset_info.json", "train/think/dataset_info.json"], ["train/full", "train/think"]),
])
def test_layouts(tmp_path, files, groups):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [group.path for group in find_groups(tmp_path)] == groups


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
