"""The model checkpoint: what is written comes back, and what is not as written is refused."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from checkpoint_cases import CONFIG, assert_same, contents, make_model, make_tokenizer
from data_pipelines.tokenizer import train_tokenizer
from irg_jax.checkpoints import names, store
from irg_jax.checkpoints.bundle import Bundles
from irg_jax.checkpoints.model import (
    Model,
    cast,
    list_leaves,
    load_model,
    load_stage_frozen,
    new_folder,
    open_model,
    save_model,
    save_stage_frozen,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "model"
    save_model(folder, make_model(tokenizer=make_tokenizer()), source={"made": "here"})
    return folder


@pytest.fixture
def saved(sound, tmp_path):
    """A checkpoint to be spoiled."""
    shutil.copytree(sound, tmp_path / "model")
    return tmp_path / "model"


def refusal(folder) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded(tmp_path, dtype):
    model = make_model(dtype, tokenizer=make_tokenizer())
    save_model(tmp_path / "new" / "model", model)
    assert_same(load_model(tmp_path / "new" / "model"), model)


def test_device_arrays_are_saved_and_host_arrays_loaded(tmp_path):
    model = make_model("bfloat16")
    on_device = dataclasses.replace(model, params=jax.tree.map(jnp.asarray, model.params))
    save_model(tmp_path / "model", on_device)
    found = load_model(tmp_path / "model")
    assert_same(found, model)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves((found.params, found.vae)))


def test_cast_rounds_the_network_alone():
    model = make_model()
    half = cast(model, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.vae)} == {"float32"}
    expected = jnp.asarray(model.params["embed"], "bfloat16")
    np.testing.assert_array_equal(half.params["embed"], expected)
    assert cast(model, None) is model


def test_description_says_what_it_is(sound):
    values = json.loads((sound / "model.json").read_text())
    assert values["dtype"] == {"model": "float32", "vae": "float32"}
    assert values["source"] == {"made": "here"}
    assert values["sha256"].keys() == dict(list_leaves(load_model(sound))).keys()


def test_orbax_alone_reads_the_parameters(sound):
    """The layout that users of other programs meet: nested names, a leaf for every layer."""
    model, tree = load_model(sound), ocp.load(sound / "params")
    kernels = tree["model"]["decoder"]["layers"]["gen"]["up"]["kernel"]
    assert list(kernels) == ["000", "001"]
    for layer, kernel in enumerate(kernels.values()):
        np.testing.assert_array_equal(kernel, model.params["decoder"]["layers"]["gen"]["up"]["kernel"][layer])
    np.testing.assert_array_equal(tree["vae"]["encoder"]["conv_in"]["bias"],
                                  model.vae["encoder"]["conv_in"]["bias"])


def test_leaves_written_in_many_pieces_are_those_written_at_once(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PIECE_BYTES", 20_000)
    pieces, save = [], ocp.partial.save
    monkeypatch.setattr(ocp.partial, "save", lambda path, tree: (pieces.append(tree), save(path, tree)))
    model = load_model(sound)
    save_model(tmp_path / "model", model)
    assert len(pieces) > 5
    assert_same(load_model(tmp_path / "model"), model)


def test_leaves_read_in_turn_come_in_any_order_and_a_piece_at_a_time(sound, monkeypatch):
    *_, reader = open_model(sound)
    order, read = sorted(reader.leaves, reverse=True), reader.read
    whole, sizes = read(order), []
    monkeypatch.setattr(store, "PIECE_BYTES", 5000)
    monkeypatch.setattr(reader, "read", lambda piece: sizes.append(len(piece)) or read(piece))
    for path, leaf in zip(order, reader.in_turn(order), strict=True):
        np.testing.assert_array_equal(leaf, whole[path])
    assert sum(sizes) == len(order) and 1 < len(sizes) < len(order)


@pytest.mark.parametrize("path, value", [
    (["version"], 1), (["config"], []), (["config", "llm"], None), (["config", "llm"], {}),
    (["config", "llm", "hidden_size"], "24"), (["config", "llm", "num_hidden_layers"], 10**9),
    (["config", "vae", "ch_mult"], 3), (["config", "vae", "scale_factor"], "big"),
    (["config", "max_latent_size"], -1), (["sha256"], None)])
def test_a_hostile_description_is_refused(saved, path, value):
    values = json.loads((saved / "model.json").read_text())
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (saved / "model.json").write_text(json.dumps(values))
    message = refusal(saved)
    assert "model.json" in message and (path[-1] in message or path[-1] == "llm")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_description_that_is_no_object_is_refused(saved, text):
    (saved / "model.json").write_text(text)
    assert "model.json" in refusal(saved)


def test_parameters_of_another_geometry_are_all_named(saved):
    values = json.loads((saved / "model.json").read_text())
    values["config"]["llm"]["intermediate_size"] += 1
    (saved / "model.json").write_text(json.dumps(values))
    message = refusal(saved)
    for expert in ("und", "gen"):
        for part in ("gate", "up", "down"):
            assert f"decoder.layers.{expert}.{part}.kernel" in message
    assert "misshapen" in message and "embed" not in message


def rewrite(saved, change) -> None:
    """The parameters anew, by Orbax alone, after `change` has worked on their leaves."""
    leaves = dict(list_leaves(load_model(saved)))
    change(leaves)
    shutil.rmtree(saved / "params")
    ocp.save(saved / "params", names.unflatten(leaves))


def test_missing_unknown_and_mistyped_parameters_are_all_named(saved):
    def spoil(leaves):
        del leaves["model.embed"], leaves["model.decoder.layers.und.q.kernel.001"]
        leaves["model.ghost"] = np.zeros(2, np.float32)
        leaves["vae.encoder.conv_in.bias"] = leaves["vae.encoder.conv_in.bias"].astype(np.int32)

    rewrite(saved, spoil)
    message = refusal(saved)
    assert "missing: model.decoder.layers.und.q.kernel.001, model.embed" in message
    assert "unknown: model.ghost" in message and "wrongly typed: vae.encoder.conv_in.bias int32" in message


def test_changed_values_are_refused_by_name(saved):
    def change(leaves):
        kernel = leaves["model.lm_head.kernel"].copy()
        kernel[3, 4] += 1
        leaves["model.lm_head.kernel"] = kernel

    rewrite(saved, change)
    message = refusal(saved)
    assert "model.lm_head.kernel" in message and "embed" not in message


def test_no_damage_to_the_files_goes_unseen(saved, sound):
    """Every file of the weights, its middle byte flipped: refused, or loaded as it was."""
    model, refused = load_model(sound), 0
    files = [file for file in (saved / "params").rglob("*") if file.is_file()]
    for path in filter(lambda file: file.stat().st_size, files):
        kept = path.read_bytes()
        middle = len(kept) // 2
        path.write_bytes(kept[:middle] + bytes([kept[middle] ^ 0xFF]) + kept[middle + 1:])
        try:
            assert_same(load_model(saved), model)
        except ValueError as error:
            assert str(saved) in str(error)
            refused += 1
        path.write_bytes(kept)
    assert refused >= 3   # the manifest, the structure and the values at least


def test_truncated_weights_are_refused(saved):
    largest = max((path for path in (saved / "params").rglob("*") if path.is_file()),
                  key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
    assert str(saved / "params") in refusal(saved)
    largest.unlink()
    assert str(saved / "params") in refusal(saved)


def test_folders_that_are_no_checkpoint(saved, tmp_path):
    assert "no model checkpoint" in refusal(tmp_path / "absent")
    assert "give one of its folders model" in refusal(tmp_path)
    shutil.rmtree(saved / "params")
    assert "has no params/" in refusal(saved)
    (saved / "params").mkdir()
    assert "no Orbax checkpoint" in refusal(saved)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(saved):
    words = [f"{first}{second}" for first in "abcdef" for second in "ghijkl"]
    tokenizer = train_tokenizer([" ".join(words)] * 2, vocab_size=CONFIG.llm.vocab_size + 20)
    assert tokenizer.vocab_size > CONFIG.llm.vocab_size
    tokenizer.save(str(saved / "tokenizer.json"))
    assert "tokenizer.json" in refusal(saved) and "vocabulary" in refusal(saved)


def test_a_new_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyError):
        with new_folder(target) as folder:
            (folder / "half").write_text("written")
            assert not target.exists()
            raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("of a run that was killed")
    target.mkdir()   # empty: allowed
    with new_folder(target) as folder:
        (folder / "whole").write_text("written")
    assert list(contents(tmp_path)) == [("out", b""), ("out/whole", b"written")]
    with pytest.raises(ValueError, match="not empty"):
        with new_folder(target):
            pass
    assert list(contents(tmp_path)) == [("out", b""), ("out/whole", b"written")]


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "half").write_text("written")
        with pytest.raises(ValueError, match=f"out' is being written by process {os.getpid()} on .*; wait"):
            with new_folder(target):
                pass
        (folder / "rest").write_text("too")
    assert list(contents(tmp_path)) == [("out", b""), ("out/half", b"written"), ("out/rest", b"too")]


def test_saving_over_something_is_refused(saved, sound):
    with pytest.raises(ValueError, match="not empty"):
        save_model(saved, make_model(seed=1))
    assert_same(load_model(saved), load_model(sound))


def save_stage(folder, model: Model, steps: dict[int, Model]) -> None:
    """A stage folder whose bundles hold the EMAs given by step."""
    save_stage_frozen(folder, model)
    for step, ema in steps.items():
        bundles = Bundles(folder, keep=5)
        bundles.save(step, state={"step": jnp.int32(step)}, position={"next_step": step},
                     ema=jax.tree.map(jnp.asarray, ema.params))
        bundles.close()


def test_a_stage_folder_is_its_newest_ema(tmp_path):
    start = make_model(tokenizer=make_tokenizer())
    old, new = make_model(seed=1), make_model(seed=2)
    save_stage(tmp_path / "stage1", start, {10: old, 20: new})
    assert_same(load_model(tmp_path / "stage1"), dataclasses.replace(start, params=new.params))
    assert "give one of its folders stage1" in refusal(tmp_path)


def test_the_frozen_part_of_a_stage_comes_back_and_can_be_written_again(tmp_path):
    stage, first = tmp_path / "stage1", make_model(seed=3)
    save_stage_frozen(stage, first)
    second = make_model(tokenizer=make_tokenizer())
    save_stage_frozen(stage, second)
    assert_same(load_stage_frozen(stage), dataclasses.replace(second, params={}))


def test_a_stage_that_was_killed_while_it_began_can_begin_again(tmp_path):
    stage, model = tmp_path / "stage1", make_model(tokenizer=make_tokenizer())
    save_stage_frozen(stage, model)
    (stage / "model.json").unlink()   # which is written last
    whole = (stage / "vae.safetensors").read_bytes()
    (stage / "vae.safetensors").write_bytes(whole[:len(whole) // 2])
    save_stage_frozen(stage, model)
    assert_same(load_stage_frozen(stage), dataclasses.replace(model, params={}))
    assert {path.name for path in stage.iterdir()} == {"model.json", "tokenizer.json", "vae.safetensors"}


def test_a_damaged_bundle_is_refused_in_a_sentence(tmp_path):
    stage, model = tmp_path / "stage1", make_model()
    save_stage(stage, model, {10: model})
    for file in (stage / "checkpoints" / "10" / "ema").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    assert "checkpoints/10 is damaged: ema/" in refusal(stage)


def test_a_stage_without_a_bundle_or_with_another_autoencoder_is_refused(tmp_path):
    stage, model = tmp_path / "stage1", make_model()
    save_stage(stage, model, {})
    assert "no params/" in refusal(stage)
    (stage / "checkpoints").mkdir()
    assert refusal(stage).endswith("stage1/checkpoints holds no complete checkpoint yet")
    (stage / "checkpoints").rmdir()
    (stage / "checkpoints").mkdir()
    assert "no complete checkpoint" in refusal(stage)
    save_stage(stage, model, {1: model})
    whole = (stage / "vae.safetensors").read_bytes()
    save_stage_frozen(tmp_path / "other", make_model(seed=4))
    shutil.copy(tmp_path / "other" / "vae.safetensors", stage)
    assert "damaged" in refusal(stage) and "vae.decoder.conv_in.kernel" in refusal(stage)
    for cut in (0, 7, 400, len(whole) - 1):
        (stage / "vae.safetensors").write_bytes(whole[:cut])
        assert "is not whole or damaged" in refusal(stage)
    (stage / "vae.safetensors").unlink()
    assert "vae.safetensors" in refusal(stage)
