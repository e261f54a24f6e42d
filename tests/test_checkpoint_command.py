"""What a training has saved, as `python -m irg_jax.checkpoint` tells it: steps, faults, contents."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from irg_jax.checkpoint import main
from irg_jax.checkpoints import bundle, listing
from irg_jax.checkpoints.bundle import Bundles, latest_step
from irg_jax.checkpoints.seals import SEAL

ROOT = pathlib.Path(__file__).parents[1]
EMA = {"decoder": {"q": jnp.ones((7, 5)), "norm": jnp.ones(5, jnp.bfloat16)},
       "embed": jax.random.normal(jax.random.key(0), (300, 10))}
POSITION = {"fingerprint": {"config.seed": 3, "groups": "abcdefgh" * 100, "folder": None}}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """A run: stage1 with the steps 1 and 2, stage2 with step 1."""
    run = tmp_path_factory.mktemp("saved") / "run"
    for stage, steps in (("stage1", (1, 2)), ("stage2", (1,))):
        bundles = Bundles(run / stage, keep=5)
        for step in steps:
            state = {"step": jnp.int32(step), "params": EMA, "opt": ({"mu": EMA, "nu": EMA},)}
            bundles.save(step, state=state, ema=jax.tree.map(lambda x: x * step, EMA),
                         position=POSITION | {"next_step": step})
        bundles.close()
    return run


@pytest.fixture
def run(written, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture
def call(capsys):
    """Runs the command; returns (exit status, stdout, stderr)."""
    def call(*words) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()
    return call


def flip(step: pathlib.Path) -> str:
    """Changes a byte of a step's largest file; returns its name in the step."""
    data = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    whole = bytearray(data.read_bytes())
    whole[len(whole) // 2] ^= 4
    data.write_bytes(whole)
    return data.relative_to(step).as_posix()


def test_ls_has_one_line_a_step_and_marks_what_a_resume_takes(run, call):
    folder = run / "stage1" / "checkpoints"
    shutil.copytree(folder / "2", folder / "3")
    (folder / "3" / SEAL).unlink()
    for name in ("2.bad", "2.bad.1", "4.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-17"):
        (folder / name).mkdir()
    (folder / "notes").mkdir()
    (folder / "6").write_text("a file")
    code, output, _ = call("ls", run / "stage1")
    rows = [line.split() for line in output.splitlines()]
    assert code == 0 and [row[:2] for row in rows] == [
        ["stage1", label] for label in ("1", "2", "2.bad", "2.bad.1", "3", "4", "5")]
    standings = ["sealed", "sealed", "set aside", "set aside", "not sealed", "under way", "under way"]
    assert all(f"MiB  {standing}" in line for line, standing in zip(output.splitlines(), standings))
    assert [row[1] for row in rows if "<-" in row] == ["2"] == [str(latest_step(run / "stage1"))]
    starts = {line.index(row[2]) for line, row in zip(output.splitlines(), rows)}
    assert len(starts) == 1, "columns are aligned"
    assert call("ls", folder)[1] == output


def test_ls_tells_time_and_size(run, call):
    step = run / "stage2" / "checkpoints" / "1"
    (step / "state" / "more").write_bytes(b"x" * 3 * 2**20)
    note = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    for stamp in (1.5e18, 1e400, 10**400, "soon", None, [1]):   # what is no time is not taken for one
        (step / "_CHECKPOINT_METADATA").write_text(json.dumps(note | {"commit_timestamp_nsecs": stamp}))
        code, output, _ = call("ls", run / "stage2")
        assert code == 0 and "MiB" in output and ("2017-07-14" in output) == (stamp == 1.5e18)
    assert float(output.split()[4]) > 3


def test_a_run_is_all_of_its_stages(run, call):
    assert [line.split()[:2] for line in call("ls", run)[1].splitlines()] == [
        ["stage1", "1"], ["stage1", "2"], ["stage2", "1"]]
    code, output, _ = call("verify", run)
    assert code == 0 and [line.split()[:3] for line in output.splitlines()] == [
        ["stage1", "1:", "sound,"], ["stage1", "2:", "sound,"], ["stage2", "1:", "sound,"]]
    code, output, _ = call("show", run)
    assert code == 0 and "stage1/checkpoints/2: sealed" in output and "stage2/checkpoints/1: sealed" in output
    assert "stage1/checkpoints/1" not in output


def test_verify_names_the_file_of_a_flipped_byte(run, call):
    name = flip(run / "stage1" / "checkpoints" / "1")
    code, output, told = call("verify", run / "stage1")
    assert code == 1 and f"stage1 1: damaged\n  {name} has changed since it was sealed\n" in output
    assert "stage1 2: sound, " in output and "1 of 2 steps" in told
    assert call("verify", run / "stage1" / "checkpoints" / "1")[0] == 1
    assert call("verify", run / "stage1" / "checkpoints" / "2")[0] == 0
    assert call("verify", run / "stage2")[0] == 0 and call("verify", run)[0] == 1


@pytest.mark.parametrize("spoil", [lambda text: text[:len(text) // 2], lambda text: "",
                                   lambda text: "[" * 100_000, lambda text: "9" * 5000])
def test_a_seal_that_cannot_be_read_is_damage(run, call, spoil):
    seal = run / "stage1" / "checkpoints" / "2" / SEAL
    seal.write_text(spoil(seal.read_text()))
    code, output, _ = call("verify", run / "stage1")
    assert code == 1 and "stage1 2: damaged\n  digests.json " in output


def test_what_does_not_count_fails_only_by_name(run, call):
    folder = run / "stage1" / "checkpoints"
    flip(folder / "1")
    (folder / "1").rename(folder / "1.bad")
    shutil.copytree(folder / "2", folder / "3")
    (folder / "3" / SEAL).unlink()
    code, output, _ = call("verify", run / "stage1")
    assert code == 0 and "1.bad: set aside; does not count" in output and "3: not sealed; does not" in output
    code, output, _ = call("verify", folder / "1.bad")
    assert code == 1 and "has changed since it was sealed" in output
    assert "was not sealed" in call("verify", folder / "3")[1]


def test_names_in_a_seal_cannot_command_the_terminal(run, call):
    seal = run / "stage1" / "checkpoints" / "2" / SEAL
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {"\x1b[2J\n\ud800": [1, ""]}))
    code, output, _ = call("verify", run / "stage1")
    assert code == 1 and r"\x1b[2J\n\ud800 is missing" in output


@pytest.mark.parametrize("action", ["ls", "verify", "show"])
def test_a_folder_with_nothing_is_told(tmp_path, call, action):
    for folder, told in ((tmp_path, "holds no checkpoints"), (tmp_path / "none", "is no folder")):
        code, output, error = call(action, folder)
        assert code == 1 and not output and told in error and error.count("\n") == 1
    (tmp_path / "stage1" / "checkpoints").mkdir(parents=True)
    code, output, error = call(action, tmp_path)
    assert ("no steps in" in output and code == 0) if action == "ls" else (
        code == 1 and "has no sealed step" in error)


def test_show_tells_items_arrays_and_position(run, call):
    step = run / "stage1" / "checkpoints" / "2"
    code, output, _ = call("show", step)
    assert code == 0 and call("show", run / "stage1") == (0, output, "")
    rows = [line.split() for line in output.splitlines()]
    size = sum(path.stat().st_size for path in (step / "ema").rglob("*") if path.is_file())
    assert ["ema", f"{size:,}"] in rows
    assert ["decoder", "2", "40", "bfloat16", "float32"] in rows and ["embed", "1", "3,000", "float32"] in rows
    assert ["opt", "6", "6,080", "bfloat16", "float32"] in rows and ["step", "1", "1", "int32"] in rows
    position = json.loads(output[output.index("{"):])
    assert position["next_step"] == 2 and position["fingerprint"]["config.seed"] == 3
    groups = position["fingerprint"]["groups"]
    assert groups.startswith("abcdefgh") and groups.endswith("...") and len(groups) == 100
    assert "decoder.q" not in output
    leaves = [line.split(maxsplit=1) for line in call("show", step, "--leaves")[1].splitlines()]
    assert ["ema.decoder.q", "[7, 5]     float32"] in leaves
    assert ["state.step", "[]         int32"] in leaves


def test_show_reads_no_array(run, call):
    """The middle of the largest file is a value, that of `embed`."""
    step = run / "stage1" / "checkpoints" / "2"
    before = call("show", step)[1]
    flip(step)
    assert call("show", step)[1] == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")   # ignore_late_faults
@pytest.mark.parametrize("name", [
    "_CHECKPOINT_METADATA", "state/_METADATA", "ema/_METADATA", "position/_METADATA", "state/manifest.ocdbt",
    "position/_strings.json", "ema/_sharding"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b'{"a": 1}', b"[" * 100_000, None])
def test_unreadable_metadata_are_a_sentence_or_do_not_matter(run, call, name, content):
    step = run / "stage1" / "checkpoints" / "2"
    (step / name).unlink()
    if content is not None:
        (step / name).write_bytes(content)
    code, output, error = call("show", step)
    assert code == 0 or (code == 1 and not output and error.startswith("error: ") and error.count("\n") == 1)
    if name.endswith("/_METADATA"):
        assert code == 1 and "is damaged or no checkpoint: " in error


@pytest.mark.parametrize("item", ["state", "ema", "position"])
def test_a_missing_item_is_told(run, call, item):
    step = run / "stage1" / "checkpoints" / "2"
    shutil.rmtree(step / item)
    assert f"lacks {item}; it is not whole" in call("show", step)[2]


def test_ls_starts_at_once():
    code = "import sys, irg_jax.checkpoint; sys.exit('jax' in sys.modules or 'orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert listing.FOLDER == bundle.FOLDER


def test_a_damaged_structure_is_one_sentence_as_typed(run):
    """Many reads fail at once; what Orbax, TensorStore and asyncio would say of each is not printed."""
    step = run / "stage1" / "checkpoints" / "2"
    (step / "state" / "manifest.ocdbt").write_bytes(b"[1]")
    process = subprocess.run([sys.executable, "-m", "irg_jax.checkpoint", "show", str(step)], cwd=ROOT,
                             text=True, capture_output=True)
    assert process.returncode == 1 and not process.stdout
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
