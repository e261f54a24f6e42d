"""The convert command: what it reports, what it replaces, what it leaves when it fails."""

import re
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from checkpoint_cases import assert_same, contents, copy_source, edit, make_model
from irg_jax.checkpoints import store
from irg_jax.checkpoints.bagel import import_folder, read_config, source_digests
from irg_jax.checkpoints.model import load_model, save_model
from irg_jax.convert import convert


def test_conversion_reports_its_coverage_and_is_done_once(source, tmp_path):
    target = tmp_path / "deep" / "target"
    report = convert(source, target)
    num_tensors = {stem: len(load_file(source / f"{stem}.safetensors")) for stem in ("ema", "ae")}
    assert re.search(rf"network: +{num_tensors['ema'] - 2} tensors", report)
    assert re.search(rf"autoencoder: +{num_tensors['ae']} tensors", report)
    assert "vit_pos_embed.pos_embed" in report
    assert_same(load_model(target), import_folder(source))
    before = dict(contents(target))
    assert "already" in convert(source, target)
    assert dict(contents(target)) == before


def test_another_target_is_replaced_only_when_asked_to(source, tmp_path):
    target, other = tmp_path / "target", make_model(seed=1)
    save_model(target, other)
    with pytest.raises(ValueError, match="--overwrite"):
        convert(source, target)
    assert_same(load_model(target), other)
    convert(source, target, overwrite=True)
    assert_same(load_model(target), import_folder(source))


def test_what_is_not_ours_is_never_replaced(source, tmp_path):
    stage = tmp_path / "stage1"
    (stage / "checkpoints").mkdir(parents=True)
    (stage / "model.json").write_text("{}")
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    before = dict(contents(tmp_path))
    for target in (stage, home, home / "letter.txt"):
        with pytest.raises(ValueError, match="exists"):
            convert(source, target, overwrite=True)
    assert dict(contents(tmp_path)) == before


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    add, added = store.Writer.add, []

    def fail(writer, path, leaf):
        added.append(path)
        if path.startswith("vae"):   # the network is written
            raise OSError("disk full")
        add(writer, path, leaf)

    monkeypatch.setattr(store, "PIECE_BYTES", 1000)
    monkeypatch.setattr(store.Writer, "add", fail)
    before = dict(contents(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "target")
    assert dict(contents(tmp_path)) == before and len(added) > 20


@pytest.mark.parametrize("piece_bytes", [20_000, 2**30])   # the first of many, and the only one at the end
def test_a_failure_in_the_thread_that_writes_reaches_the_caller(source, tmp_path, monkeypatch, piece_bytes):
    def fail(path, tree):
        raise OSError("disk full")

    monkeypatch.setattr(store, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(store.ocp.partial, "save", fail)
    before = dict(contents(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "target")
    assert dict(contents(tmp_path)) == before


def test_a_failed_replacement_keeps_the_old_model(source, tmp_path):
    target, other = tmp_path / "target", make_model(seed=1)
    save_model(target, other)
    edit(source / "ema.safetensors", lambda tensors: tensors.pop("llm2vae.bias"))
    with pytest.raises(ValueError):
        convert(source, target, overwrite=True)
    assert_same(load_model(target), other)


def test_the_digests_of_the_source_tell_every_file(source):
    before = source_digests(source)
    assert before.keys() == {"llm_config.json", "vit_config.json", "config.json", "tokenizer.json",
                             "ema.safetensors", "ae.safetensors"}
    edit(source / "ae.safetensors", lambda tensors: tensors["encoder.conv_in.bias"].fill(7))
    after = source_digests(source)
    assert {name for name in before if before[name] != after[name]} == {"ae.safetensors"}


def run_command(*arguments):
    return subprocess.run([sys.executable, "-m", "irg_jax.convert", *map(str, arguments)],
                          capture_output=True, text=True, timeout=60)


def test_command(golden_dir, tmp_path):
    source, target = copy_source(golden_dir, tmp_path / "source"), tmp_path / "target"
    done = run_command("--source", source, "--target", target)
    assert done.returncode == 0 and "converted" in done.stdout, done.stderr
    assert load_model(target).config == read_config(golden_dir)
    edit(source / "ema.safetensors", lambda tensors: tensors.pop("vae2llm.bias"))
    bad = run_command("--source", source, "--target", tmp_path / "none")
    assert bad.returncode == 1 and "Traceback" not in bad.stderr
    assert "missing: vae2llm.bias" in bad.stderr
    assert not (tmp_path / "none").exists()
