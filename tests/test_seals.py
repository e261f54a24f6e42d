"""A bundle that is not what was written is never restored: files flipped, cut, lengthened, lost or added."""

import contextlib
import json
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax.checkpoints import bundle, seals
from irg_jax.checkpoints.bundle import Bundles, latest_step, restore_ema
from irg_jax.checkpoints.seals import SEAL, find_faults, seal, set_bad_aside, steps_of

EMA = {"a": jnp.arange(3000, dtype=jnp.float32), "b": {"c": jnp.ones((7, 5))}}
SHAPES = jax.eval_shape(lambda: EMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """A stage with the steps 1 and 2."""
    stage = tmp_path_factory.mktemp("sealed") / "stage1"
    bundles = Bundles(stage, keep=5)
    for step in (1, 2):
        bundles.save(step, state={"step": jnp.int32(step)}, position={"next_step": step},
                     ema=jax.tree.map(lambda x: x * step, EMA))
    bundles.close()
    return stage


@pytest.fixture
def stage(written, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(written, tmp_path / "stage1"))


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def assert_doubled(ema) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other * 2), ema, EMA)


def test_what_is_sound_is_restored(stage):
    folder = stage / "checkpoints"
    assert steps_of(folder) == [2, 1] and latest_step(stage) == 2
    assert find_faults(folder / "2") == [] and set_bad_aside(folder) == []
    ema, step = restore_ema(stage, SHAPES)
    assert step == 2
    assert_doubled(ema)


def test_every_region_of_every_file_is_watched(stage):
    """Flipped at many places, cut, lengthened, lost: always found, and the step before is taken."""
    folder, cases = stage / "checkpoints", 0
    for path in files_of(folder / "2"):
        whole = path.read_bytes()
        places = {len(whole) * part // 6 for part in range(6)} | {len(whole) - 1} if whole else set()
        flipped = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:] for at in sorted(places)]
        for spoiled in (*flipped, whole[:len(whole) // 2] if whole else None, whole + b"\0", None):
            if spoiled is None:
                path.unlink()
            else:
                path.write_bytes(spoiled)
            cases += 1
            assert find_faults(folder / "2"), (path, spoiled)
            if not (folder / "2" / SEAL).exists():   # a step without its seal is no step
                assert restore_ema(stage, SHAPES)[1] == 1
            elif path.is_relative_to(folder / "2" / "state"):   # which is not read
                assert find_faults(folder / "2", ["ema", "position"]) == []
            elif path.name == SEAL:   # what it says of the state is not looked at
                with contextlib.suppress(ValueError):
                    assert_doubled(restore_ema(stage, SHAPES)[0])
            else:
                with pytest.raises(ValueError, match="is damaged: "):
                    restore_ema(stage, SHAPES)
            path.write_bytes(whole)
    assert cases >= 200 and find_faults(folder / "2") == []


def test_a_bad_step_is_set_aside_and_the_one_before_restored(stage):
    folder = stage / "checkpoints"
    data = max(files_of(folder / "2" / "ema"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    [sentence] = set_bad_aside(folder)
    assert "is not used" in sentence and "has changed since it was sealed" in sentence and "2.bad" in sentence
    assert steps_of(folder) == [1] and latest_step(stage) == 1 and (folder / "2.bad").is_dir()
    assert restore_ema(stage, SHAPES)[1] == 1
    bundles = Bundles(stage, keep=5)      # Orbax minds neither the folder set aside nor the step again
    bundles.save(2, state={"step": jnp.int32(2)}, position={"next_step": 2}, ema=EMA)
    bundles.close()
    assert find_faults(folder / "2") == [] and latest_step(stage) == 2
    (folder / "2" / SEAL).unlink()
    assert "was not sealed" in set_bad_aside(folder)[0] and (folder / "2.bad.1").is_dir()


def test_of_a_bundle_no_more_is_hashed_than_is_read(stage, monkeypatch):
    read, digest = [], seals._digest
    monkeypatch.setattr(seals, "_digest", lambda path: read.append(path) or digest(path))
    restore_ema(stage, SHAPES)
    items = {path.relative_to(stage / "checkpoints" / "2").parts[0] for path in read}
    assert {"ema", "position"} < items and "state" not in items


def test_what_the_ema_lacks_is_read_from_a_sound_state_or_not_at_all(tmp_path):
    bundles = Bundles(tmp_path, keep=1)
    bundles.save(1, state={"step": jnp.int32(1), "params": EMA}, ema={"a": EMA["a"]},
                 position={"next_step": 1, "not_averaged": ["b.c"]})
    bundles.close()
    jax.tree.map(np.testing.assert_array_equal, restore_ema(tmp_path, SHAPES)[0], EMA)
    files = files_of(tmp_path / "checkpoints" / "1" / "state")
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="checkpoints/1 is damaged: state/"):
        restore_ema(tmp_path, SHAPES)


@pytest.mark.parametrize("lost", ["check_sound", "damage"])
def test_a_step_that_a_training_drops_meanwhile_is_not_damaged(stage, monkeypatch, lost):
    """Here the newest, so that the one before is taken; in a training, an older one for a newer."""
    whole, calls = getattr(bundle, lost), []

    def drop(step, *items):
        if not calls:
            calls.append(step)
            (step / SEAL).unlink()
            shutil.rmtree(step)
        return whole(step, *items)
    monkeypatch.setattr(bundle, lost, drop)
    assert restore_ema(stage, SHAPES, check=bundle.check_sound)[1] == 1
    assert calls == [(stage / "checkpoints" / "2").absolute()]


def test_a_file_that_was_added_is_found(stage):
    (stage / "checkpoints" / "2" / "ema" / "d" / "more").write_bytes(b"x")
    assert find_faults(stage / "checkpoints" / "2") == ["ema/d/more was not there when it was sealed"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}', "\xff", "[" * 100_000])
def test_a_seal_that_says_nothing_is_a_fault(stage, text):
    (stage / "checkpoints" / "2" / SEAL).write_text(text, encoding="latin-1")
    assert find_faults(stage / "checkpoints" / "2")


def test_a_seal_is_whole_or_absent(stage, monkeypatch):
    step = stage / "checkpoints" / "2"
    (step / SEAL).unlink()
    monkeypatch.setattr(pathlib.Path, "rename", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seal(step)
    assert not (step / SEAL).exists() and "was not sealed" in find_faults(step)[0]
    monkeypatch.undo()
    seal(step)
    assert find_faults(step) == [] and json.loads((step / SEAL).read_text())


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_sealed_step_stays_until_newer_ones_are_sealed(stage, monkeypatch, keep):
    """Killed while 3 and 4 are written but not sealed, a run would go on from 2."""
    held = threading.Event()
    monkeypatch.setattr(bundle, "seal", lambda step: held.wait(60) and seal(step))
    bundles = Bundles(stage, keep=keep)
    for step in (3, 4):
        bundles.save(step, state={"step": jnp.int32(step)}, position={"next_step": step}, ema=EMA)
    bundles._checkpointer._manager.wait_until_finished()
    folder = stage / "checkpoints"
    assert steps_of(folder) == [4, 3, 2, 1] and latest_step(stage) == 2 and find_faults(folder / "2") == []
    held.set()
    bundles.close()
    assert steps_of(folder) == [4, 3][:keep] and latest_step(stage) == 4


def test_what_is_left_of_a_dropped_step_is_no_step(stage, monkeypatch):
    """As a kill leaves it, or a file that another process holds open; the next seal removes it."""
    folder = stage / "checkpoints"
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: (path / "_CHECKPOINT_METADATA").unlink())
    bundle.drop_before(folder, 1)
    assert "was not sealed" in find_faults(folder / "1")[0] and find_faults(folder / "2") == []
    monkeypatch.undo()
    bundles = Bundles(stage, keep=1)
    bundles.save(3, state={"step": jnp.int32(3)}, position={"next_step": 3}, ema=EMA)
    bundles.close()
    assert steps_of(folder) == [3]


def test_no_stage_no_step(tmp_path):
    assert latest_step(tmp_path / "none") == 0 and set_bad_aside(tmp_path / "none") == []
