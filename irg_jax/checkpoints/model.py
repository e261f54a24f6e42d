"""The model checkpoint: a folder that holds all that inference needs.

    model.json       geometry; where the weights came from; a sha256 of every leaf of params/
    tokenizer.json   absent only if the source had none
    params/          Orbax: {"model": the network, "vae": the autoencoder}, a leaf for every layer

It is written under another name and renamed at the end, so it is whole or absent. A stage folder of
a training run (`model.json`, `tokenizer.json`, `vae.safetensors`, `checkpoints/`) is its EMA.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from data_pipelines.tokenizer import Tokenizer
from irg_jax.checkpoints import names
from irg_jax.checkpoints.bundle import FOLDER as BUNDLES
from irg_jax.checkpoints.bundle import restore_ema
from irg_jax.checkpoints.locks import locked
from irg_jax.checkpoints.names import listing
from irg_jax.checkpoints.safetensors_files import Pending, TensorFiles, write_tensors
from irg_jax.checkpoints.store import Reader, Writer, check_digests, check_shapes, digest
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Params

DESCRIPTION, TOKENIZER = "model.json", "tokenizer.json"
PARAMS, FROZEN = "params", "vae"
VERSION = 2
# Beyond any real model, below what would exhaust memory: position tables have a row for each pair of a side.
_LIMIT, _COUNT_LIMIT, _SIDE_LIMIT = 10**7, 1000, 512
_SIDES = ("max_latent_size", "vit_max_num_patch_per_side")


@dataclasses.dataclass(frozen=True)
class Model:
    """Geometry, tokenizer (None if the source had none) and the parameters as nested dicts."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    params: Params
    vae: Params


def cast(model: Model, dtype: str | None) -> Model:
    """The network in another dtype; None keeps each parameter's. The autoencoder keeps its own."""
    if dtype is None:
        return model
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), model.params)
    return dataclasses.replace(model, params=params)


def save_model(path: str | pathlib.Path, model: Model, *, source: dict[str, Any] | None = None,
               replace: bool = False) -> None:
    """Writes a model checkpoint.

    Args: source goes into `model.json` as it is; replace allows another model checkpoint at `path`.
    Raises: ValueError if `path` holds anything already.
    """
    write_model(path, model.config, model.tokenizer, list_leaves(model), source=source, replace=replace)


def write_model(path: str | pathlib.Path, config: ModelConfig, tokenizer: Tokenizer | None,
                leaves: Iterable[tuple[str, np.ndarray]], *, source: dict[str, Any] | None = None,
                replace: bool = False) -> None:
    """`save_model` of leaves as they come; nothing is at `path` if making them fails.

    `source` is looked at after the last leaf.
    """
    with new_folder(path, replace=replace) as folder:
        with Writer(folder / PARAMS) as writer:
            for name, leaf in leaves:
                writer.add(name, leaf)
                del leaf   # while the next is made
        _save_texts(folder, config, tokenizer, writer.dtypes, writer.digests, source)


def load_model(path: str | pathlib.Path) -> Model:
    """Reads a model checkpoint, or a stage folder (its newest EMA), as numpy arrays on the host.

    Raises: ValueError naming what is missing, every parameter whose shape or dtype is not what the
        geometry asks for, and every parameter whose bytes have changed since they were written.
    """
    folder = pathlib.Path(path).absolute()
    if (folder / BUNDLES).is_dir():
        stage = load_stage_frozen(folder)
        params, _ = restore_ema(folder, names.model_shapes(stage.config))
        return dataclasses.replace(stage, params=jax.tree.map(np.asarray, params))
    config, tokenizer, reader = open_model(folder)
    return Model(config, tokenizer, *join_leaves(reader.read(reader.leaves), model_slots(config)))


def open_model(path: str | pathlib.Path) -> tuple[ModelConfig, Tokenizer | None, Reader]:
    """A model checkpoint whose leaves are read when they are asked for. Raises: as `load_model`."""
    folder = pathlib.Path(path).absolute()
    config, description = load_description(folder)
    shapes = {f"{part}.{slot.leaf}": slot.our_shape for part, slots in model_slots(config).items()
              for slot in slots}
    return config, load_tokenizer(folder, config), Reader(folder / PARAMS, shapes, description["sha256"])


def list_leaves(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(path, leaf) of a model checkpoint."""
    whole = {"model": model.params, "vae": model.vae}
    for part, slots in model_slots(model.config).items():
        for name, leaf in names.unstack(names.flatten(whole[part]), slots):
            yield f"{part}.{name}", np.asarray(leaf)


def model_slots(config: ModelConfig) -> dict[str, list[names.Slot]]:
    """The slots of the network and of the autoencoder, by the first word of their leaves' paths."""
    return {"model": names.model_slots(config), "vae": names.vae_slots(config.vae)}


def join_leaves(leaves: dict[str, np.ndarray], parts: dict[str, list[names.Slot]]) -> list[Params]:
    """The parameters of each part: the inverse of `list_leaves`. Takes them out of `leaves` as it goes."""
    whole = []
    for part, slots in parts.items():
        found = {slot.leaf: leaves.pop(f"{part}.{slot.leaf}") for slot in slots}
        whole.append(names.unflatten(names.stack(found, slots)))
    return whole


def save_stage_frozen(folder: str | pathlib.Path, model: Model) -> None:
    """Writes what a stage does not train: tokenizer, autoencoder and, last of all, `model.json`."""
    folder = pathlib.Path(folder).absolute()
    (folder / DESCRIPTION).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    # No Orbax: it saves on all hosts of a run or on none, and one writes this.
    leaves = {f"vae.{path}": np.asarray(leaf) for path, leaf in names.flatten(model.vae).items()}
    write_tensors(folder, FROZEN, [Pending(name, leaf.shape, leaf.dtype) for name, leaf in leaves.items()],
                  lambda asked: (leaves[name] for name, _ in asked))
    dtypes = {"vae": {leaf.dtype.name for leaf in leaves.values()}}
    digests = {name: digest(leaf) for name, leaf in leaves.items()}
    _save_texts(folder, model.config, model.tokenizer, dtypes, digests)


def load_stage_frozen(folder: str | pathlib.Path) -> Model:
    """What `save_stage_frozen` wrote; `params` is empty. Raises ValueError as `load_model` does."""
    folder = pathlib.Path(folder).absolute()
    config, description = load_description(folder)
    slots, files = names.vae_slots(config.vae), TensorFiles(folder, [FROZEN])
    if files.faults:
        raise ValueError(f"{str(folder)!r} is not whole or damaged: {'; '.join(files.faults)}")
    leaves = {name: np.concatenate([block.copy() for block in found]).reshape(files.entries[name].shape)
              for name, found in files.tensors()}
    check_shapes(folder / FROZEN, leaves, {f"vae.{slot.leaf}": slot.our_shape for slot in slots})
    check_digests(folder / FROZEN, leaves, description["sha256"])
    (vae,) = join_leaves(leaves, {"vae": slots})
    return Model(config, load_tokenizer(folder, config), {}, vae)


def load_description(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The geometry in `model.json`, and the whole of it. Raises ValueError naming the field."""
    path = folder / DESCRIPTION
    if not path.is_file():
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no model checkpoint and no stage folder: it does not exist")
        stages = [child.parent.name for child in folder.glob(f"*/{DESCRIPTION}")]
        hint = f"; give one of its folders {listing(stages)}" if stages else ""
        if (folder / "llm_config.json").is_file():    # BAGEL's layout
            hint = "; it has the released layout: python -m irg_jax.convert makes a checkpoint of it"
        raise ValueError(f"{str(folder)!r} is no model checkpoint and no stage folder (it has no "
                         f"{DESCRIPTION}){hint}")
    values = read_json(path)
    if values.get("version") != VERSION:
        raise ValueError(f"{path}: version is {values.get('version')!r}; only {VERSION} is known")
    for key in ("config", "sha256"):
        if not isinstance(values.get(key), dict):
            raise ValueError(f"{path}: {key} must be an object, not {values.get(key)!r}")
    config = values["config"]
    parts = {part: read_fields(cls, config.get(part), where=f"{path}: config.{part}")
             for part, cls in (("llm", LLMConfig), ("vit", ViTConfig), ("vae", VAEConfig))}
    return read_fields(ModelConfig, config, where=f"{path}: config", **parts), values


def load_tokenizer(folder: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
    """The folder's `tokenizer.json`, or None. Raises ValueError if it does not fit the geometry."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    return Tokenizer.from_file(str(path), vocab_size=config.llm.vocab_size)


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill that takes the name `path` when the block ends without an error.

    Args: replace allows a model checkpoint at `path`; it goes when the new one is whole.
    Raises: ValueError if `path` is a file, or a folder with anything (else) in it, or if another process is
        writing it.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    folder = partial / path.name
    with locked(partial / "lock", f"{str(path)!r} is being written", "folder"):
        try:
            _check_free(path, replace)
            shutil.rmtree(folder, ignore_errors=True)   # left by a run that was killed
            folder.mkdir()
            yield folder
            if path.exists():
                shutil.rmtree(path)
            folder.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, not {type(values).__name__}")
    return values


def read_fields(cls: type, values: Any, *, where: str, **given: Any) -> Any:
    """An instance of a config dataclass from untrusted JSON.

    Fields of `values` that the class lacks are left alone; `given` are fields known already.
    Raises: ValueError naming `where` and the field that is missing, mistyped or out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object of fields, not {values!r}")
    fields = [field for field in dataclasses.fields(cls) if field.name not in given]
    missing = [field.name for field in fields
               if field.default is dataclasses.MISSING and field.name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**given, **{field.name: _checked(field, values[field.name]) for field in fields
                               if field.name in values})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_free(path: pathlib.Path, replace: bool) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not replace:
            raise ValueError(f"{str(path)!r} exists and is not empty; choose another folder")
        if not ((path / DESCRIPTION).is_file() and (path / PARAMS).is_dir()):
            raise ValueError(f"{str(path)!r} exists and is no model checkpoint (one has "
                             f"{DESCRIPTION} and {PARAMS}/); choose another folder")


def _save_texts(folder: pathlib.Path, config: ModelConfig, tokenizer: Tokenizer | None,
                dtypes: dict[str, set[str]], digests: dict[str, str], source: dict[str, Any] | None = None
                ) -> None:
    if tokenizer is not None:
        tokenizer.save(str(folder / TOKENIZER))
    values = {"version": VERSION, "config": dataclasses.asdict(config),
              "dtype": {part: " ".join(sorted(found)) for part, found in dtypes.items()},
              "source": source, "sha256": digests}
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _checked(field: dataclasses.Field, value: Any) -> Any:
    if field.type is float:
        low = -1e9 if field.name == "shift_factor" else 1e-30
        if type(value) in (int, float) and low <= value <= 1e9:
            return float(value)
        raise ValueError(f"{field.name} is {value!r}; it must be a number from {low} to 1e9")
    items = [value] if field.type is int else value
    high = _COUNT_LIMIT if field.name.startswith("num_") else _SIDE_LIMIT if field.name in _SIDES else _LIMIT
    low = -high if field.name == "vit_select_layer" else 1
    if (not isinstance(items, list) or not 1 <= len(items) <= 16
            or any(type(item) is not int or not low <= item <= high for item in items)):
        kind = "an integer" if field.type is int else "a list of integers"
        raise ValueError(f"{field.name} is {value!r}; it must be {kind} from {low} to {high}")
    return value if field.type is int else tuple(value)
