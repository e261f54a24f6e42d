"""Small models and sources for the tests of checkpoints, and ways to spoil them."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.tokenizer import Tokenizer, train_tokenizer
from irg_jax.checkpoints import names
from irg_jax.checkpoints.bagel import import_folder
from irg_jax.checkpoints.model import Model
from irg_jax.config import BAGEL_7B_MOT
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig

RELEASE = BAGEL_7B_MOT
CONFIG = ModelConfig(
    LLMConfig(vocab_size=300, hidden_size=24, intermediate_size=20, num_hidden_layers=2,
              num_attention_heads=3, num_key_value_heads=1),
    ViTConfig(hidden_size=12, intermediate_size=10, num_hidden_layers=3, num_attention_heads=2,
              patch_size=4),
    VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=3),
    max_latent_size=5, vit_max_num_patch_per_side=6, timestep_shift=2.5)
TENSORS = dict[str, np.ndarray]


def make_model(dtype: str = "float32", *, seed: int = 0,
               tokenizer: Tokenizer | None = None) -> Model:
    """Random weights; the autoencoder's are float32, as in the release."""
    rng = np.random.default_rng(seed)
    fill = lambda dtype: lambda leaf: rng.normal(size=leaf.shape).astype(dtype)
    return Model(CONFIG, tokenizer, jax.tree.map(fill(dtype), names.model_shapes(CONFIG)),
                 jax.tree.map(fill("float32"), names.vae_shapes(CONFIG.vae)))


def make_tokenizer() -> Tokenizer:
    return train_tokenizer(["a red circle and a blue square", "two green stars"],
                           vocab_size=CONFIG.llm.vocab_size)


def copy_source(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """The folder without its golden values."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.*"))
    for path in (target, *target.iterdir()):
        path.chmod(0o755)
    return target


def edit(file: pathlib.Path, change: Callable[[TENSORS], None]) -> None:
    """Rewrites a safetensors file after `change` has worked on its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def split_file(file: pathlib.Path, num_shards: int) -> dict[str, str]:
    """Replaces a safetensors file by shards; returns the weight map, whose index is not written."""
    tensors = load_file(file)
    file.unlink()
    placed = {}
    for number in range(num_shards):
        shard = f"{file.stem}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::num_shards]}
        save_file(part, file.with_name(shard))
        placed |= dict.fromkeys(part, shard)
    return placed


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    """All there is to an array: equal only if dtype, shape and every bit are."""
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.tobytes()


def assert_same(left: Model, right: Model) -> None:
    """Equal geometry, tokenizer and parameters, bit for bit."""
    assert left.config == right.config
    assert (left.tokenizer is None) == (right.tokenizer is None)
    if left.tokenizer is not None:
        assert left.tokenizer.fingerprint == right.tokenizer.fingerprint
    for one, other in ((left.params, right.params), (left.vae, right.vae)):
        one, other = names.flatten(one), names.flatten(other)
        assert one.keys() == other.keys()
        differing = [path for path in one if bits(one[path]) != bits(other[path])]
        assert not differing


def contents(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, hidden ones too, with its bytes."""
    for path in sorted(folder.rglob("*")):
        yield path.relative_to(folder).as_posix(), path.read_bytes() if path.is_file() else b""


def refusal(source) -> str:
    with pytest.raises(ValueError) as caught:
        import_folder(source)
    return str(caught.value)


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
