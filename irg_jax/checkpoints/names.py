"""The one table between torch names and our parameters, read in both directions.

A torch module with `weight` and `bias` is one of ours with `kernel` (linear, convolution) or
`scale` (norm) and `bias`, so the table lists modules. Our layers are stacked: parameter
`decoder.layers.und.q.kernel` [L, in, out] holds L torch tensors [out, in]. The autoencoder's
attributes bear the torch names: its table is that rule alone.
Source: the state dicts of BAGEL's modeling/bagel/bagel.py and modeling/autoencoder.py.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from irg_jax.checkpoints.listing import printable
from irg_jax.models.autoencoder import Autoencoder
from irg_jax.models.config import ModelConfig, VAEConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import IRG
from irg_jax.models.layers import sincos_table

_DECODER, _VISION = "language_model.model", "vit_model.vision_model"
_EXPERT = {
    "input_norm": "input_layernorm{}",
    "q": "self_attn.q_proj{}", "k": "self_attn.k_proj{}",
    "v": "self_attn.v_proj{}", "o": "self_attn.o_proj{}",
    "q_norm": "self_attn.q_norm{}", "k_norm": "self_attn.k_norm{}",
    "post_norm": "post_attention_layernorm{}",
    "gate": "mlp{}.gate_proj", "up": "mlp{}.up_proj", "down": "mlp{}.down_proj",
}
_VIT_LAYER = {
    "norm1": "layer_norm1", "norm2": "layer_norm2",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.out_proj",
    "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}
_SUFFIX = {"und": "", "gen": "_moe_gen"}
# Modules by their dotted path, and two parameters that have no module; `*` is the layer.
_TABLE = {
    "embed": f"{_DECODER}.embed_tokens.weight",
    **{f"decoder.layers.{expert}.{ours}": f"{_DECODER}.layers.*.{torch.format(suffix)}"
       for expert, suffix in _SUFFIX.items() for ours, torch in _EXPERT.items()},
    "decoder.norm": f"{_DECODER}.norm",
    "decoder.norm_gen": f"{_DECODER}.norm_moe_gen",
    "lm_head": "language_model.lm_head",
    "vit.patch_embed": f"{_VISION}.embeddings.patch_embedding",
    "vit.position": f"{_VISION}.embeddings.position_embedding.weight",
    **{f"vit.layers.{ours}": f"{_VISION}.encoder.layers.*.{torch}"
       for ours, torch in _VIT_LAYER.items()},
    "vit.post_norm": f"{_VISION}.post_layernorm",
    "connector.fc1": "connector.fc1", "connector.fc2": "connector.fc2",
    "vae2llm": "vae2llm", "llm2vae": "llm2vae",
    "time_embedder.fc1": "time_embedder.mlp.0", "time_embedder.fc2": "time_embedder.mlp.2",
}
_LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}   # [out, in] -> [in, out]; OIHW -> HWIO


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one torch tensor: a whole parameter, or one layer of a stacked one."""

    name: str                # torch name
    path: str                # dotted path of our parameter
    layer: int | None
    shape: tuple[int, ...]   # in the torch layout
    axes: tuple[int, ...]    # the transposition from the torch layout to ours

    @property
    def leaf(self) -> str:
        """The path of this slot's part in a model checkpoint, where every layer has a leaf of its own."""
        return self.path if self.layer is None else f"{self.path}.{self.layer:03d}"

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of the part in our layout."""
        return tuple(self.shape[axis] for axis in self.axes)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view in our layout."""
        return tensor.transpose(self.axes)

    def to_torch(self, part: np.ndarray) -> np.ndarray:
        """A view in the torch layout: the inverse of `to_ours`."""
        return part.transpose(np.argsort(self.axes))


@dataclasses.dataclass(frozen=True)
class FixedTable:
    """A position table that torch keeps among its tensors and we rebuild from the formula."""

    name: str
    side: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.side**2, self.width

    def build(self) -> np.ndarray:
        return sincos_table(self.side, self.width)


def model_shapes(config: ModelConfig) -> Params:
    """The network's parameters as `jax.ShapeDtypeStruct`."""
    return Functional(lambda rngs: IRG(config, rngs=rngs)).shapes


def vae_shapes(config: VAEConfig) -> Params:
    """The autoencoder's parameters as `jax.ShapeDtypeStruct`."""
    return Functional(lambda rngs: Autoencoder(config, rngs=rngs)).shapes


def model_slots(config: ModelConfig) -> list[Slot]:
    """Every tensor of `ema.safetensors` but the fixed tables; every parameter is covered."""
    return [slot for path, leaf in flatten(model_shapes(config)).items()
            for slot in _slots(path, leaf.shape, _torch_name(path))]


def vae_slots(config: VAEConfig) -> list[Slot]:
    """Every tensor of `ae.safetensors`."""
    return [slot for path, leaf in flatten(vae_shapes(config)).items()
            for slot in _slots(path, leaf.shape, _weight_name(path, path.rpartition(".")[0]))]


def fixed_tables(config: ModelConfig) -> list[FixedTable]:
    """The two position tables of `ema.safetensors`."""
    width = config.llm.hidden_size
    return [FixedTable("latent_pos_embed.pos_embed", config.max_latent_size, width),
            FixedTable("vit_pos_embed.pos_embed", config.vit_max_num_patch_per_side, width)]


def stack(leaves: dict[str, np.ndarray], slots: Sequence[Slot]) -> dict[str, np.ndarray]:
    """The whole parameters of {slot.leaf: part}; takes the parts out of `leaves` as it goes."""
    params: dict[str, np.ndarray] = {}
    depth = collections.Counter(slot.path for slot in slots)
    for slot in slots:
        part = leaves.pop(slot.leaf)
        if slot.layer is None:
            params[slot.path] = part
            continue
        if slot.path not in params:
            params[slot.path] = np.empty((depth[slot.path], *part.shape), part.dtype)
        params[slot.path][slot.layer] = part
    return params


def unstack(params: dict[str, np.ndarray], slots: Sequence[Slot]) -> Iterator[tuple[str, np.ndarray]]:
    """(slot.leaf, part) of whole parameters: the inverse of `stack`."""
    for slot in slots:
        whole = params[slot.path]
        yield slot.leaf, whole if slot.layer is None else whole[slot.layer]


def flatten(tree: Params) -> dict[str, jax.ShapeDtypeStruct]:
    """Nested dicts -> {dotted path: leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, np.ndarray]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in leaves.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def listing(items: Iterable[str], limit: int = 20) -> str:
    """The first items, as they may be printed, and how many there are beyond."""
    items = list(map(printable, items))
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


def _torch_name(path: str) -> str:
    if path in _TABLE:
        return _TABLE[path]
    return _weight_name(path, _TABLE[path.rpartition(".")[0]])


def _weight_name(path: str, module: str) -> str:
    return f"{module}.{_LEAF[path.rpartition('.')[2]]}"


def _slots(path: str, shape: tuple[int, ...], name: str) -> Iterator[Slot]:
    stacked = "*" in name
    rank = len(shape) - stacked
    axes = _TO_OURS[rank] if path.endswith(".kernel") else tuple(range(rank))
    torch_shape = tuple(shape[stacked:][axis] for axis in np.argsort(axes))
    for layer in range(shape[0]) if stacked else [None]:
        yield Slot(name.replace("*", str(layer)), path, layer, torch_shape, axes)
