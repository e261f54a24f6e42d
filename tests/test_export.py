"""Exporting: the golden checkpoint comes back tensor for tensor, and import(export(x)) is x."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from checkpoint_cases import CONFIG, assert_same, bits, contents, make_model, make_tokenizer
from data_pipelines.tokenizer import CONTROL_TOKENS
from irg_jax.checkpoints import bagel, names, safetensors_files
from irg_jax.checkpoints.bagel import export_folder, import_folder, read_config
from irg_jax.checkpoints.model import cast, load_model, save_model

FILES = {"llm_config.json", "vit_config.json", "config.json", "ema.safetensors", "ae.safetensors"}
# Fields of the originals that state nothing about the network.
UNUSED = {"max_position_embeddings", "resolution"}


def assert_same_tensors(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    assert not [name for name in one if bits(one[name]) != bits(other[name])]


def test_golden_exports_as_it_was(golden_dir, tmp_path):
    export_folder(import_folder(golden_dir), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for name in ("ema.safetensors", "ae.safetensors"):
        assert_same_tensors(golden_dir / name, tmp_path / "out" / name)


@pytest.mark.parametrize("block_bytes, tile", [(1, 2), (100, 5), (1000, 7)])
def test_tensors_in_many_blocks_are_those_in_one(golden_dir, tmp_path, monkeypatch, block_bytes, tile):
    """At the released size a tensor is read and written a few rows at a time, transposed in tiles."""
    whole = import_folder(golden_dir)
    monkeypatch.setattr(safetensors_files, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(safetensors_files, "TILE", tile)
    assert_same(import_folder(golden_dir), whole)
    export_folder(whole, tmp_path / "out")
    for name in ("ema.safetensors", "ae.safetensors"):
        assert_same_tensors(golden_dir / name, tmp_path / "out" / name)


def test_golden_geometry_exports_as_it_was(golden_dir, tmp_path):
    export_folder(import_folder(golden_dir), tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(golden_dir)
    for name in ("llm_config.json", "vit_config.json", "config.json"):
        wanted = json.loads((golden_dir / name).read_text())
        found = json.loads((tmp_path / "out" / name).read_text())
        if "vae_config" in wanted:
            wanted |= wanted.pop("vae_config")
            found |= found.pop("vae_config")
        assert {key: found.get(key) for key in wanted.keys() - UNUSED} == {
            key: wanted[key] for key in wanted.keys() - UNUSED}


def test_golden_survives_the_way_through_a_checkpoint(golden_dir, tmp_path):
    save_model(tmp_path / "checkpoint", import_folder(golden_dir))
    export_folder(load_model(tmp_path / "checkpoint"), tmp_path / "out")
    for name in ("ema.safetensors", "ae.safetensors"):
        assert_same_tensors(golden_dir / name, tmp_path / "out" / name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_then_import_is_the_identity(tmp_path, dtype):
    model = make_model(dtype, tokenizer=make_tokenizer())
    export_folder(model, tmp_path / "out")
    assert_same(import_folder(tmp_path / "out"), model)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {
        "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}


def test_parameters_of_several_dtypes_each_keep_theirs(tmp_path):
    model = make_model("bfloat16")
    params = jax.tree.map(lambda leaf: leaf, model.params)
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"].astype(np.float32)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].astype(np.float32)
    model = dataclasses.replace(model, params=params)
    export_folder(model, tmp_path / "out")
    assert_same(import_folder(tmp_path / "out"), model)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=8, max_size=8))
def test_every_finite_bit_pattern_survives(tmp_path_factory, patterns):
    """Negative zero, subnormals and the largest values included."""
    patterns = np.array([0x8000, 0x0001, 0x7F7F, 0xFF7F, *patterns], np.uint16)
    values = patterns.view(ml_dtypes.bfloat16)
    values = np.where(np.isfinite(values), values, 0).astype(ml_dtypes.bfloat16)
    model = make_model("bfloat16")
    flat = model.params["decoder"]["layers"]["gen"]["up"]["kernel"].reshape(-1)
    flat[:len(values)] = values
    out = tmp_path_factory.mktemp("patterns") / "out"
    export_folder(model, out)
    assert_same(import_folder(out), model)


def test_dtype_is_the_networks(tmp_path):
    model = make_model()
    export_folder(model, tmp_path / "half", dtype="bfloat16")
    assert_same(import_folder(tmp_path / "half"), cast(model, "bfloat16"))
    with safe_open(tmp_path / "half" / "ema.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    with safe_open(tmp_path / "half" / "ae.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}
    export_folder(cast(model, "bfloat16"), tmp_path / "full", dtype="float32")
    assert_same(import_folder(tmp_path / "full"), cast(cast(model, "bfloat16"), "float32"))


def test_tokens_have_their_ids_in_the_files_of_bagels_tokenizer(tmp_path):
    """Against the library's own reader of such files; added tokens take the next ids, in their order."""
    tokenizer = make_tokenizer()
    export_folder(make_model(tokenizer=tokenizer), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    read = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
        str(tmp_path / "out" / "vocab.json"), str(tmp_path / "out" / "merges.txt")))
    read.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    size = read.get_vocab_size()
    read.add_special_tokens([told["added_tokens_decoder"][id_]["content"] for id_ in
                             sorted(told["added_tokens_decoder"], key=int)])
    assert [int(id_) for id_ in told["added_tokens_decoder"]] == [*range(size, size + 4)]
    for text in ("a red circle and\n two  green stars", "\u00e4\u6f22\U0001f600", "squarecircle"):
        assert read.encode(text).ids == tokenizer.encode(text)
    assert [read.token_to_id(token) for token in CONTROL_TOKENS] == [
        tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image]
    assert {*CONTROL_TOKENS} == {*told["additional_special_tokens"]}


def test_files_are_as_readable_as_their_folder(tmp_path):
    export_folder(make_model(), tmp_path / "out")
    allowed = (tmp_path / "out").stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {allowed}


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    model = make_model()
    model.params["embed"][0, 0] = np.nan
    model.vae["encoder"]["conv_in"]["bias"][0] = np.inf
    with pytest.raises(ValueError, match="embed, encoder.conv_in.bias"):
        export_folder(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty"):
        export_folder(make_model(), tmp_path / "out")
    assert list(contents(tmp_path)) == [("out", b""), ("out/letter.txt", b"dear")]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def fail(folder, stem, tensors, make, **_):
        written.append(stem)
        (folder / f"{stem}.safetensors").write_bytes(b"half")
        if len(written) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(bagel, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        export_folder(make_model(), tmp_path / "out")
    assert written == ["ema", "ae"] and list(tmp_path.iterdir()) == []


def run_command(*arguments):
    return subprocess.run([sys.executable, "-m", "irg_jax.export", *map(str, arguments)],
                          capture_output=True, text=True, timeout=60)


def test_command(tmp_path):
    model = make_model(tokenizer=make_tokenizer())
    save_model(tmp_path / "model", model)
    done = run_command("--checkpoint", tmp_path / "model", "--format", "bagel",
                       "--out", tmp_path / "bagel")
    assert done.returncode == 0, done.stderr
    assert_same(import_folder(tmp_path / "bagel"), model)
    done = run_command("--checkpoint", tmp_path / "model", "--format", "orbax",
                       "--out", tmp_path / "orbax", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert_same(load_model(tmp_path / "orbax"), cast(model, "bfloat16"))
    bad = run_command("--checkpoint", tmp_path, "--format", "bagel", "--out", tmp_path / "none")
    assert bad.returncode == 1 and "Traceback" not in bad.stderr
    assert "give one of its folders" in bad.stderr and not (tmp_path / "none").exists()


def test_every_parameter_reaches_the_file_it_belongs_to(tmp_path):
    """Each tensor of one export holds its own number, so none can have taken another's place."""
    numbers, model = {}, make_model()
    for part, slots in ((model.params, names.model_slots(CONFIG)),
                        (model.vae, names.vae_slots(CONFIG.vae))):
        leaves = names.flatten(part)
        for slot in slots:
            numbers[slot.name] = len(numbers) + 1.0
            target = leaves[slot.path] if slot.layer is None else leaves[slot.path][slot.layer]
            target[...] = numbers[slot.name]
    export_folder(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "ema.safetensors") | load_file(
        tmp_path / "out" / "ae.safetensors")
    for name, number in numbers.items():
        assert np.all(tensors[name] == number), name
