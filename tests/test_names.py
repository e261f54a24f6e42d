"""The name table covers the real release and every parameter, once each, in both directions."""

import collections
import json
import math
import pathlib

import numpy as np
import pytest

from checkpoint_cases import CONFIG, RELEASE
from irg_jax.checkpoints import names
from irg_jax.models.functional import Params

LISTING = pathlib.Path(__file__).parent / "golden" / "bagel_7b_mot_tensors.json"


@pytest.fixture(scope="module")
def listing():
    return json.loads(LISTING.read_text())


def test_every_tensor_of_the_release_has_its_place(listing):
    parts = [*names.model_slots(RELEASE), *names.fixed_tables(RELEASE)]
    assert {part.name: list(part.shape) for part in parts} == listing["ema.safetensors"]
    assert len(parts) == 1223
    assert sum(math.prod(part.shape) for part in parts) == 14_607_260_128


def test_every_tensor_of_the_released_autoencoder_has_its_place(listing):
    slots = names.vae_slots(RELEASE.vae)
    assert {slot.name: list(slot.shape) for slot in slots} == listing["ae.safetensors"]
    assert len(slots) == 244


@pytest.mark.parametrize("config", [CONFIG, RELEASE], ids=["small", "release"])
def test_every_parameter_is_filled_exactly_once(config):
    for shapes, slots in ((names.model_shapes(config), names.model_slots(config)),
                          (names.vae_shapes(config.vae), names.vae_slots(config.vae))):
        layers = collections.defaultdict(list)
        for slot in slots:
            layers[slot.path].append(slot.layer)
        leaves = names.flatten(shapes)
        assert layers.keys() == leaves.keys()
        for path, found in layers.items():
            stacked = ".layers." in path
            assert found == (list(range(leaves[path].shape[0])) if stacked else [None]), path
        values = sum(math.prod(slot.shape) for slot in slots)
        assert values == sum(math.prod(leaf.shape) for leaf in leaves.values())


@pytest.mark.parametrize("path, torch", [
    ("decoder.layers.und.{}", "language_model.model.layers.1.{}"),
    ("vit.layers.{}", "vit_model.vision_model.encoder.layers.1.{}")])
def test_parts_of_equal_shape_are_not_confused(path, torch):
    """Written out a second time, since no shape can tell these apart."""
    pairs = {
        "decoder": {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm",
                    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "q": "self_attn.q_proj",
                    "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm",
                    "k_norm": "self_attn.k_norm", "gate": "mlp.gate_proj", "up": "mlp.up_proj"},
        "vit": {"norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj",
                "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"},
    }[path.partition(".")[0]]
    found = {slot.path.rpartition(".")[0]: slot.name.rpartition(".")[0]
             for slot in names.model_slots(CONFIG) if slot.layer == 1}
    assert {path.format(ours): torch.format(theirs) for ours, theirs in pairs.items()}.items() <= (
        found.items())


def test_experts_differ_by_suffix_only():
    slots = names.model_slots(CONFIG)
    und = {slot.path: slot.name for slot in slots if ".und." in slot.path}
    gen = {slot.path: slot.name for slot in slots if ".gen." in slot.path}
    assert len(und) == len(gen) > 0
    for path, name in gen.items():
        assert "_moe_gen" in name
        assert und[path.replace(".gen.", ".und.")] == name.replace("_moe_gen", "")


@pytest.mark.parametrize("path, expected", [
    ("lm_head.kernel", lambda tensor: tensor.T),
    ("embed", lambda tensor: tensor),
    ("vit.position", lambda tensor: tensor),
    ("decoder.norm.scale", lambda tensor: tensor),
    ("encoder.conv_in.kernel", lambda tensor: np.einsum("oihw->hwio", tensor)),
    ("encoder.down.0.block.0.norm1.scale", lambda tensor: tensor),
])
def test_layouts(path, expected):
    slots = {slot.path: slot for slot in (*names.model_slots(CONFIG), *names.vae_slots(CONFIG.vae))}
    slot = slots[path]
    tensor = np.arange(math.prod(slot.shape)).reshape(slot.shape)
    np.testing.assert_array_equal(slot.to_ours(tensor), expected(tensor))


def test_both_directions_are_inverse():
    rng = np.random.default_rng(0)
    for slot in (*names.model_slots(CONFIG), *names.vae_slots(CONFIG.vae)):
        tensor = rng.normal(size=slot.shape)
        assert slot.to_ours(tensor).shape == slot.our_shape
        np.testing.assert_array_equal(slot.to_torch(slot.to_ours(tensor)), tensor)


def test_layers_are_stacked_in_their_order_and_come_apart_again():
    rng, slots = np.random.default_rng(0), names.model_slots(CONFIG)
    parts = {slot.leaf: rng.normal(size=slot.our_shape) for slot in slots}
    whole = names.stack(dict(parts), slots)
    shapes = names.flatten(names.model_shapes(CONFIG))
    assert whole.keys() == shapes.keys()
    assert all(leaf.shape == shapes[path].shape for path, leaf in whole.items())
    for slot in slots:
        found = whole[slot.path] if slot.layer is None else whole[slot.path][slot.layer]
        np.testing.assert_array_equal(found, parts[slot.leaf])
    apart = dict(names.unstack(whole, slots))
    assert apart.keys() == parts.keys()
    assert all((apart[path] == part).all() for path, part in parts.items())


def test_flatten_is_inverse():
    tree: Params = {"a": {"0": {"kernel": 1}, "b": 2}, "c": 3}
    leaves = names.flatten(tree)
    assert leaves == {"a.0.kernel": 1, "a.b": 2, "c": 3}
    assert names.unflatten(leaves) == tree


def test_a_long_listing_is_cut_with_a_count():
    assert names.listing(["a", "b"], limit=2) == "a, b"
    assert names.listing(["a", "b", "c", "d"], limit=2) == "a, b and 2 more"
