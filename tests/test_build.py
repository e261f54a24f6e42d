"""The builder writes whole data sets or nothing, the same bytes for the same configuration."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pyarrow.parquet
import pytest

from data_cases import data_config
from data_pipelines.build import build
from data_pipelines.config import BuildConfig, GroupConfig, ImageTransform, from_config_dict, load_config
from data_pipelines.pipeline import make_iterator
from data_pipelines.records import ImagePart, TextPart, parse_conversation
from data_pipelines.shapes import build as build_module
from data_pipelines.shapes import records as shapes
from data_pipelines.sources import ParquetRows
from data_pipelines.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = BuildConfig(counts=dict.fromkeys(shapes.MODES, 5) | {"text_to_image": 3}, seed=7,
                     num_heldout_prompts=6, rows_per_file=4, rows_per_group=2)
VAE, VIT, BOTH = (False, True, False), (False, False, True), (False, True, True)
LOSS = (True, False, False)
# The learning modes: what of the assistant's and the user's parts is there, and what carries loss.
SEQUENCES = {
    "initial_thinking_understanding": [False, BOTH, False, True],
    "initial_thinking_generation": [False, True],
    "initial_full": [False, True, LOSS],
    "improving_thinking_understanding": [False, BOTH, BOTH, False, True],
    "improving_thinking_generation": [False, False, BOTH, True],
    "improving_full": [False, False, BOTH, True, LOSS],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("build") / "data"
    assert build(CONFIG, out=out)
    return out


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def test_files_and_manifest(built):
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["config"] == dataclasses.asdict(CONFIG)
    assert set(manifest["files"]) == set(contents(built)) - {"manifest.json"}
    for mode, count in CONFIG.counts.items():
        files = sorted((built / "train" / mode).iterdir())
        assert [file.name for file in files] == [f"{i:04d}.parquet" for i in range(-(-count // 4))]
        assert len(ParquetRows(built / "train" / mode)) == count
        assert pyarrow.parquet.ParquetFile(files[0]).metadata.row_group(0).num_rows == 2
    prompts = [json.loads(line) for line in open(built / "prompts_heldout.jsonl", encoding="utf-8")]
    assert len(prompts) == 6 and len({prompt["id"] for prompt in prompts}) == 6
    assert not [file for file in built.parent.iterdir() if file != built]


@pytest.mark.parametrize("mode", SEQUENCES)
def test_records_follow_their_mode(built, mode):
    row = ParquetRows(built / "train" / mode)[0]
    parts = parse_conversation(row.text, mode=mode, place=row.place).parts
    flags = [part.need_loss if isinstance(part, TextPart) else tuple(part[1:4]) for part in parts]
    system, *rest = flags
    assert isinstance(parts[0], TextPart) and system is False
    assert rest == SEQUENCES[mode]
    assert all(part.data[:4] == b"\x89PNG" for part in parts if isinstance(part, ImagePart))


@pytest.mark.parametrize("workers", [1, 2])
def test_same_configuration_same_bytes(built, tmp_path, workers):
    assert build(CONFIG, out=tmp_path / "again", workers=workers)
    assert contents(tmp_path / "again") == contents(built)


def test_more_records_leave_the_first_ones_alone(built, tmp_path):
    more = dataclasses.replace(CONFIG, counts=dict.fromkeys(CONFIG.counts, 6))
    build(more, out=tmp_path / "more")
    for mode, count in CONFIG.counts.items():
        one, other = (ParquetRows(out / "train" / mode) for out in (built, tmp_path / "more"))
        assert [one[i].text for i in range(count)] == [other[i].text for i in range(count)]


def test_a_finished_data_set_is_kept_and_another_refused(built, tmp_path):
    small = BuildConfig(counts={"initial_full": 2}, num_heldout_prompts=1)
    out = tmp_path / "data"
    assert build(small, out=out)
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert not build(small, out=out)
    assert times == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    other = dataclasses.replace(small, seed=1)
    with pytest.raises(ValueError, match="another data set .its config, probe differ.*--overwrite"):
        build(other, out=out)
    assert times == {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert build(other, out=out, overwrite=True) and not build(other, out=out)
    (out / "prompts_heldout.jsonl").write_text("changed by hand\n")
    with pytest.raises(ValueError, match="its files differ"):
        build(other, out=out)


def test_folders_that_are_not_ours_are_never_removed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    with pytest.raises(ValueError, match="exists and is no data set"):
        build(CONFIG, out=tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"meow"


def test_what_no_folder_can_replace_is_named_before_anything_is_written(tmp_path):
    (tmp_path / "file").touch()
    for out, told in ((tmp_path / "file", "file' is no folder"), ("/proc", "'/proc' is a mount point")):
        with pytest.raises(ValueError, match=f"{told}, and no data set can take its place"):
            build(CONFIG, out=out, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_link_leads_to_the_data_set(built, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "data")
    assert build(CONFIG, out=tmp_path / "link") and not build(CONFIG, out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk" / "data") == contents(built)
    assert build(dataclasses.replace(CONFIG, seed=8), out=tmp_path / "link", overwrite=True)
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["data"]


def test_an_interrupted_build_leaves_no_data_set(tmp_path, monkeypatch):
    good, calls = shapes.gather_one, iter(range(10**6))
    def gather_one(*args, **kwargs):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return good(*args, **kwargs)
    monkeypatch.setattr(build_module.shapes, "gather_one", gather_one)
    with pytest.raises(KeyboardInterrupt):
        build(CONFIG, out=tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert build(CONFIG, out=tmp_path / "data")
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_unknown_modes_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown mode 'initial_ful'"):
        build(BuildConfig(counts={"initial_ful": 1}), out=tmp_path / "data")


@pytest.mark.parametrize("size, total", [("", 16800), (":quick", 384)])
def test_the_shipped_configuration(size, total):
    config = from_config_dict(BuildConfig, load_config(f"{ROOT}/configs/shapes_data.py{size}"))
    assert sum(config.counts.values()) == total and set(config.counts) == set(shapes.MODES)


def test_built_data_train(built):
    """The whole way: every mode from parquet to a packed batch."""
    texts = [part.text for mode in shapes.MODES for part in parse_conversation(
        ParquetRows(built / "train" / mode)[0].text, mode=mode, place="").parts
        if isinstance(part, TextPart)]
    config = data_config(
        source=str(built), groups=tuple(GroupConfig(mode) for mode in shapes.MODES),
        text_tokens=4096, vit_tokens=128, latent_tokens=128, images=8,
        vae_transform=ImageTransform(16, 64, 64), vit_transform=ImageTransform(14, 56, 56))
    iterator = make_iterator(config, train_tokenizer(texts, vocab_size=600))
    batches = [next(iterator) for _ in range(3)]
    groups = {entry.group for i in range(12) for entry in iterator.packs.planner[i].entries}
    iterator.close()
    assert groups == set(shapes.MODES)
    for batch in batches:
        assert (batch.text_weight.sum(axis=1) > 0).all()
        assert (batch.latent_weight.sum(axis=1) > 0).any()
        assert set(batch.image_height.ravel()) <= {0, 4}


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "data_pipelines.build", *arguments], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_command(tmp_path):
    small = [f"--config.counts.{mode}=1" for mode in shapes.MODES]
    arguments = ["--config=configs/shapes_data.py:quick", "--source=shapes", "--format=parquet",
                 f"--out={tmp_path}/data", "--config.num_heldout_prompts=2", *small]
    done = run(*arguments)
    assert done.returncode == 0 and "wrote 6 records of 6 modes" in done.stdout, done.stderr
    assert "already built" in run(*arguments).stdout
    done = run(*arguments, "--config.seed=5")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "--overwrite" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--config=configs/shapes_data.py", "--config.seeed=1"],
     "unknown config field 'seeed'; did you mean 'seed'?"),
    (["--config=configs/shapes_data.py", "--config.seed=one"], "config field 'seed' is 'one' (str)"),
    (["--config=configs/shapes_data.py", "--config.seed"], "--config.seed has no value"),
    (["--config=configs/shapes_data.py", "--config.rows_per_group=0"], "rows_per_group is 0"),
    (["--config=configs/absent.py"], "configs/absent.py"),
    (["--config=configs/shapes_data.py", "--format=array_record"], "shapes is written as parquet"),
    (["--config=configs/shapes_data.py", "--format=array_record", "--source=."], "has no field data"),
    (["--config=configs/irgl_stage1.py", "--format=array_record", "--source=."], "--tokenizer is missing"),
])
def test_mistakes_are_a_sentence_and_an_exit_code(tmp_path, arguments, message):
    done = run(*arguments, f"--out={tmp_path}/data")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert not (tmp_path / "data").exists()
