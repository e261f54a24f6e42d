"""Importing a released folder: all right, or every fault in one message and nothing written."""

import json
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from checkpoint_cases import (
    assert_same,
    change_json,
    contents,
    edit,
    refusal,
    split_file,
)
from irg_jax.checkpoints.bagel import import_folder, read_config
from irg_jax.convert import convert
from irg_jax.models.config import VAEConfig


def test_golden_weights_are_where_the_network_looks_for_them(golden_dir):
    found = import_folder(golden_dir)
    network = load_file(golden_dir / "ema.safetensors")
    vae = load_file(golden_dir / "ae.safetensors")
    experts, prefix = found.params["decoder"]["layers"], "language_model.model.layers"
    for layer in range(found.config.llm.num_hidden_layers):
        for expert, suffix in (("und", ""), ("gen", "_moe_gen")):
            np.testing.assert_array_equal(
                experts[expert]["k"]["kernel"][layer],
                network[f"{prefix}.{layer}.self_attn.k_proj{suffix}.weight"].T)
            np.testing.assert_array_equal(
                experts[expert]["down"]["kernel"][layer],
                network[f"{prefix}.{layer}.mlp{suffix}.down_proj.weight"].T)
            np.testing.assert_array_equal(
                experts[expert]["post_norm"]["scale"][layer],
                network[f"{prefix}.{layer}.post_attention_layernorm{suffix}.weight"])
    np.testing.assert_array_equal(found.params["embed"],
                                  network["language_model.model.embed_tokens.weight"])
    np.testing.assert_array_equal(found.vae["decoder"]["conv_out"]["kernel"],
                                  np.einsum("oihw->hwio", vae["decoder.conv_out.weight"]))


def test_golden_geometry_is_the_files(golden_dir):
    config = read_config(golden_dir)
    read = lambda name: json.loads((golden_dir / name).read_text())
    llm, vit, whole = read("llm_config.json"), read("vit_config.json"), read("config.json")
    assert (config.llm.hidden_size, config.vit.num_hidden_layers, config.max_latent_size) == (
        llm["hidden_size"], vit["num_hidden_layers"], whole["max_latent_size"])
    assert list(config.vae.ch_mult) == whole["vae_config"]["ch_mult"]
    assert config.timestep_shift == whole["timestep_shift"]


def test_absent_fields_have_the_values_of_the_release(source):
    (source / "config.json").unlink()
    config = read_config(source)
    assert config.vae == VAEConfig() and config.vae.ch_mult == (1, 2, 4, 4)
    assert (config.latent_patch_size, config.max_latent_size) == (2, 64)
    assert (config.vit_max_num_patch_per_side, config.vit_select_layer) == (70, -2)


@pytest.mark.parametrize("file, fields", [
    ("llm_config.json", {"hidden_act": "gelu"}),
    ("llm_config.json", {"tie_word_embeddings": True}),
    ("llm_config.json", {"qk_norm": False}),
    ("llm_config.json", {"rope_scaling": {"type": "yarn"}}),
    ("llm_config.json", {"hidden_size": "24"}),
    ("llm_config.json", {"hidden_size": 24.0}),
    ("llm_config.json", {"hidden_size": True}),
    ("llm_config.json", {"vocab_size": 10**18}),
    ("llm_config.json", {"num_hidden_layers": 0}),
    ("llm_config.json", {"num_hidden_layers": 10**6}),
    ("llm_config.json", {"num_attention_heads": 7}),
    ("llm_config.json", {"rope_theta": float("nan")}),
    ("llm_config.json", {"rms_norm_eps": 10**400}),
    ("vit_config.json", {"hidden_act": "relu"}),
    ("vit_config.json", {"rope": True}),
    ("vit_config.json", {"num_attention_heads": 5}),
    ("config.json", {"visual_gen": False}),
    ("config.json", {"interpolate_pos": True}),
    ("config.json", {"vit_select_layer": 9}),
    ("config.json", {"max_latent_size": 513}),
    ("config.json", {"vit_max_num_patch_per_side": 10**7}),
    ("config.json", {"vae_config": []}),
    ("config.json", {"vae_config": {"ch_mult": 4}}),
    ("config.json", {"vae_config": {"ch_mult": []}}),
    ("config.json", {"vae_config": {"ch_mult": [1, "2"]}}),
    ("config.json", {"vae_config": {"downsample": 16}}),
    ("config.json", {"vae_config": {"ch": 33}}),
])
def test_geometry_that_cannot_be_is_refused(source, file, fields):
    change_json(source / file, **fields)
    field, value = next(iter(fields.items()))
    field = next(iter(value)) if field == "vae_config" and value else field
    message = refusal(source)
    assert file in message and field in message


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", "null"])
def test_json_that_is_no_object_is_refused(source, text):
    (source / "llm_config.json").write_bytes(text.encode("latin-1"))
    assert "llm_config.json" in refusal(source)


def test_a_missing_file_is_named(source):
    for name in ("vit_config.json", "ema.safetensors", "ae.safetensors"):
        kept = (source / name).read_bytes()
        (source / name).unlink()
        assert name in refusal(source)
        (source / name).write_bytes(kept)
    assert "no folder" in refusal(source / "ema.safetensors")


def test_a_field_that_is_needed_is_named(source):
    values = json.loads((source / "llm_config.json").read_text())
    del values["vocab_size"], values["hidden_size"]
    (source / "llm_config.json").write_text(json.dumps(values))
    assert re.search("llm_config.json lacks vocab_size, hidden_size", refusal(source))


def spoil_network(tensors):
    del tensors["llm2vae.bias"]
    tensors["ghost.weight"] = np.zeros(3, np.float32)
    tensors["vae2llm.weight"] = tensors["vae2llm.weight"].T.copy()
    tensors["vae2llm.bias"] = tensors["vae2llm.bias"].astype(np.int32)
    tensors["connector.fc1.weight"][1, 2] = np.nan
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    layer = "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight"
    tensors[layer] = tensors[layer].astype(ml_dtypes.bfloat16)
    tensors["vit_pos_embed.pos_embed"][3, 1] += 1e-4


def spoil_autoencoder(tensors):
    tensors["decoder.mid.block_1.conv1.bias"][0] = -np.inf
    del tensors["encoder.conv_in.weight"]


FAULTS = {
    "missing": "llm2vae.bias", "unknown": "ghost.weight", "misshapen": "vae2llm.weight",
    "wrongly typed": "vae2llm.bias", "NaN or infinity": "connector.fc1.weight",
    "not the fixed position table": "vit_pos_embed.pos_embed"}
OTHERS = ("language_model.model.layers.1.mlp.up_proj.weight", "encoder.conv_in.weight",
          "language_model.model.layers.1.self_attn.q_norm_moe_gen.weight",
          "decoder.mid.block_1.conv1.bias")


def test_all_faults_come_in_one_message_and_nothing_is_written(source, tmp_path):
    edit(source / "ema.safetensors", spoil_network)
    edit(source / "ae.safetensors", spoil_autoencoder)
    before = dict(contents(tmp_path))
    with pytest.raises(ValueError) as caught:
        convert(source, tmp_path / "target")
    message = str(caught.value)
    for kind, name in FAULTS.items():
        assert re.search(rf"ema.safetensors: {kind}: .*{re.escape(name)}", message), kind
    for name in OTHERS:
        assert name in message
    sound = "language_model.lm_head.weight"
    assert sound not in message and "latent_pos_embed" not in message
    assert dict(contents(tmp_path)) == before


@pytest.mark.parametrize("table", ["latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"])
def test_a_position_table_must_be_explained(source, table):
    def spoil(tensors):
        tensors[table][:] = tensors[table][::-1]
    edit(source / "ema.safetensors", spoil)
    assert f"not the fixed position table: {table}" in refusal(source)


def test_every_kind_of_fault_is_refused_alone(source):
    whole = (source / "ema.safetensors").read_bytes()
    name = "time_embedder.mlp.0.bias"
    changes = {
        "missing": lambda tensors: tensors.pop(name),
        "unknown": lambda tensors: tensors.update({name + "2": tensors[name]}),
        "misshapen": lambda tensors: tensors.update({name: tensors[name][:-1]}),
        "wrongly typed": lambda tensors: tensors.update({name: tensors[name].astype(np.float64)}),
        "NaN or infinity": lambda tensors: tensors.update({name: tensors[name] * np.nan})}
    for kind, change in changes.items():
        edit(source / "ema.safetensors", change)
        assert re.search(rf"{kind}: {name}", refusal(source))
        (source / "ema.safetensors").write_bytes(whole)
    import_folder(source)


def test_many_faults_of_a_kind_are_counted(source):
    edit(source / "ema.safetensors", lambda tensors: [tensors.pop(name) for name in list(tensors)
                                                      if ".mlp" in name])
    message = refusal(source)
    listed = message.count(".mlp")
    assert listed == 20 and re.search(r"and \d+ more", message)


def test_truncation_names_the_tensors_that_are_cut(source):
    path = source / "ema.safetensors"
    with safe_open(path, framework="numpy") as file:
        order = file.offset_keys()
        last_bytes = file.get_tensor(order[-1]).nbytes
    path.write_bytes(path.read_bytes()[:-last_bytes - 1])
    edit(source / "ae.safetensors", spoil_autoencoder)
    message = refusal(source)
    assert all(f in message for f in ("truncated", order[-1], order[-2], "encoder.conv_in.weight"))
    assert order[0] + "," not in message


def test_names_that_a_terminal_would_obey_are_told_in_letters(source):
    edit(source / "ae.safetensors", lambda tensors: tensors.update({"\x1b]0;owned\x07": np.float32([0])}))
    assert "unknown: \\x1b]0;owned\\x07" in refusal(source)
    (source / "ae.safetensors").unlink()
    index = source / "ae.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"\x1b[2J": "../x"}}))
    assert "places \\x1b[2J in '../x'" in refusal(source)


def test_an_empty_file_lacks_every_tensor(source):
    for name in ("ema", "ae"):
        path = source / f"{name}.safetensors"
        kept = path.read_bytes()
        save_file({}, path)
        message = refusal(source)
        assert f"{name}.safetensors: missing" in message and "more" in message
        path.write_bytes(kept)


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_a_stump_of_a_file_is_refused(source, size):
    path = source / "ae.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "ae.safetensors: truncated or no safetensors file" in refusal(source)


def header_file(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_hostile_headers_are_refused(source):
    path, entry = source / "ae.safetensors", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "ae.safetensors" in refusal(source)
    header_file(path, {"a": entry | {"shape": [10**6]}}, b"1234")   # larger than its bytes
    assert "ae.safetensors" in refusal(source)
    header_file(path, {"a": entry, "b": entry}, b"1234")            # overlapping
    assert "ae.safetensors" in refusal(source)
    header_file(path, {"a": entry | {"data_offsets": "x"}}, b"1234")
    assert "ae.safetensors" in refusal(source)


def test_a_header_that_the_library_refused_is_not_read_beyond_its_limit(source):
    path = source / "ae.safetensors"
    with path.open("wb") as file:   # a sparse file: its header would be all of it
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(10**9 + 8)
    tracemalloc.start()
    message, (_, peak) = refusal(source), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "ae.safetensors: truncated or no safetensors file" in message and peak < 10**8


def test_shards_equal_one_file(source):
    whole = import_folder(source)
    for stem, num_shards in (("ema", 3), ("ae", 2)):
        placed = split_file(source / f"{stem}.safetensors", num_shards)
        index = source / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert_same(import_folder(source), whole)


@pytest.mark.parametrize("shard", [
    "../ae.safetensors", "/etc/passwd", "sub/ae.safetensors", "..", "", "ae.bin",
    "a\\b.safetensors", "a\0.safetensors", 7, None, ["ae.safetensors"]])
def test_a_shard_cannot_be_elsewhere(source, shard):
    placed = split_file(source / "ae.safetensors", 2)
    first = next(iter(placed))
    text = json.dumps({"weight_map": placed | {first: shard}})
    (source / "ae.safetensors.index.json").write_text(text)
    message = refusal(source)
    assert f"places {first} in {shard!r}" in message


def test_an_index_must_agree_with_its_shards(source):
    placed, index = split_file(source / "ae.safetensors", 2), source / "ae.safetensors.index.json"
    first, second = list(placed)[0], list(placed)[-1]
    index.write_text(json.dumps({"weight_map": placed | {first: placed[second]}}))
    assert first in refusal(source)
    (source / placed[first]).unlink()
    index.write_text(json.dumps({"weight_map": placed}))
    assert f"names {placed[first]}, which does not exist" in refusal(source)
    for text in ("", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000):
        index.write_text(text)
        assert "ae.safetensors.index.json" in refusal(source)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ema.pt", "ema.pth", "model.ckpt"])
def test_pickle_is_refused_by_name(source, name):
    (source / "ema.safetensors").rename(source / name)
    message = refusal(source)
    assert name in message and "pickle" in message and "refused" in message


def test_ema_is_preferred_to_model(source):
    whole = import_folder(source)
    (source / "model.safetensors").write_bytes(b"not read")
    assert_same(import_folder(source), whole)
    (source / "ema.safetensors").replace(source / "model.safetensors")
    assert_same(import_folder(source), whole)


@pytest.mark.parametrize("dtype, kept", [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_dtype_of_the_file_is_kept_where_the_model_can_compute_in_it(source, dtype, kept):
    edit(source / "ema.safetensors", lambda tensors: tensors.update(
        {name: tensor.astype(dtype) for name, tensor in tensors.items()}))
    rounded = load_file(source / "ema.safetensors")["language_model.model.embed_tokens.weight"]
    embed = import_folder(source).params["embed"]
    assert embed.dtype.name == kept
    np.testing.assert_array_equal(embed, rounded.astype(kept))
    assert import_folder(source, dtype="bfloat16").params["embed"].dtype.name == "bfloat16"


def test_a_tokenizer_of_another_vocabulary_is_refused(source):
    change_json(source / "llm_config.json", vocab_size=260)
    assert "vocabulary" in refusal(source)
