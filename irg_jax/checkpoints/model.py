"""The model checkpoint: a folder that holds all that inference needs.

    model.json       geometry; shape, dtype and sha256 of every parameter; where it came from
    tokenizer.json   absent only if the source had none
    params/          Orbax: {"model": the network, "vae": the autoencoder}

It is written under another name and renamed at the end, so it is whole or absent. A stage folder of a
training run (`model.json`, `tokenizer.json`, `vae/`, `checkpoints/`) is read as the model its EMA is.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipelines.tokenizer import Tokenizer
from irg_jax.checkpoints import names
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Params

DESCRIPTION, TOKENIZER = "model.json", "tokenizer.json"
VERSION = 1
DTYPES = ("float32", "bfloat16")
_LIMIT, _COUNT_LIMIT = 10**7, 1000   # beyond any real model, below what would exhaust memory


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
    return dataclasses.replace(model, params=jax.tree.map(lambda x: np.asarray(x, dtype), model.params))


def save_model(path: str | pathlib.Path, model: Model, *, source: dict[str, Any] | None = None,
               replace: bool = False) -> None:
    """Writes a model checkpoint.

    Args: source goes into `model.json` as it is; replace allows another model checkpoint at `path`.
    Raises: ValueError if `path` holds anything already.
    """
    tree = jax.tree.map(np.asarray, {"model": model.params, "vae": model.vae})
    with new_folder(path, replace=replace) as folder:
        ocp.save(folder.absolute() / "params", tree)
        if model.tokenizer is not None:
            model.tokenizer.save(str(folder / TOKENIZER))
        parameters = {path: {"shape": leaf.shape, "dtype": leaf.dtype.name, "sha256": digest(leaf)}
                      for path, leaf in names.flatten(tree).items()}
        save_description(folder, model.config, source=source, parameters=parameters)


def load_model(path: str | pathlib.Path) -> Model:
    """Reads a model checkpoint, or a stage folder (its newest EMA), as numpy arrays on the host.

    Raises: ValueError naming what is missing, every parameter whose shape or dtype is not what the
        geometry asks for, and every parameter whose bytes have changed since they were written.
    """
    folder = pathlib.Path(path).absolute()
    config, description = load_description(folder)
    if (folder / "params").is_dir():
        tree = _restore(folder / "params", {"model": names.model_shapes(config),
                                            "vae": names.vae_shapes(config.vae)})
    elif (folder / "checkpoints").is_dir():
        from irg_jax.checkpoints import bundle   # the bundle's own imports lead back here
        tree = {"model": jax.tree.map(np.asarray, bundle.restore_ema(folder)),
                "vae": _restore(folder / "vae", names.vae_shapes(config.vae))}
    else:
        raise ValueError(f"{str(folder)!r} has neither params/ nor checkpoints/; it is not whole")
    records = description.get("parameters", {})
    changed = [name for name, leaf in names.flatten(tree).items()
               if name in records and records[name]["sha256"] != digest(leaf)]
    if changed:
        raise ValueError(f"{str(folder)!r} is damaged; these parameters differ from what was written: "
                         f"{listing(changed)}")
    tokenizer = None
    if (folder / TOKENIZER).exists():
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER), vocab_size=config.llm.vocab_size)
    return Model(config, tokenizer, tree["model"], tree["vae"])


def save_description(folder: pathlib.Path, config: ModelConfig, **extra: Any) -> None:
    """Writes `model.json`: the geometry, and whatever else is worth knowing."""
    values = {"version": VERSION, "config": dataclasses.asdict(config), **extra}
    (folder / DESCRIPTION).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_description(folder: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The geometry in `model.json`, and the whole of it. Raises ValueError naming the field."""
    path = folder / DESCRIPTION
    if not path.is_file():
        stages = [child.parent.name for child in folder.glob(f"*/{DESCRIPTION}")]
        hint = f"; give one of its folders {listing(stages)}" if stages else ""
        raise ValueError(f"{str(folder)!r} is no model checkpoint and no stage folder (it has no "
                         f"{DESCRIPTION}){hint}")
    values = read_json(path)
    if values.get("version") != VERSION:
        raise ValueError(f"{path}: version is {values.get('version')!r}; this program reads {VERSION}")
    for key in ("config", "parameters"):
        if not isinstance(values.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be an object, not {values[key]!r}")
    for name, record in values.get("parameters", {}).items():
        if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
            raise ValueError(f"{path}: parameters: {name} has no sha256")
    config = values.get("config", {})
    parts = {part: read_fields(cls, config.get(part), where=f"{path}: config.{part}")
             for part, cls in (("llm", LLMConfig), ("vit", ViTConfig), ("vae", VAEConfig))}
    return read_fields(ModelConfig, config, where=f"{path}: config", **parts), values


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, *, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill that takes the name `path` when the block ends without an error.

    Args: replace allows a model checkpoint at `path`; it goes when the new one is whole.
    Raises: ValueError if `path` is a file, or a folder with anything (else) in it.
    """
    path = pathlib.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not replace:
            raise ValueError(f"{str(path)!r} exists and is not empty; choose another folder")
        if not (path / DESCRIPTION).is_file():
            raise ValueError(f"{str(path)!r} exists and is no model checkpoint (it has no {DESCRIPTION}); "
                             "choose another folder")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)   # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(array: Any) -> str:
    """sha256 of an array's bytes, row by row."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()


def listing(items: Iterable[str], limit: int = 20) -> str:
    """The first items, and how many there are beyond."""
    items = list(items)
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


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

    Fields of `values` that the class lacks are left alone; `given` are fields that are known already.
    Raises: ValueError naming `where` and the field that is missing, of another type or out of range.
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


def _checked(field: dataclasses.Field, value: Any) -> Any:
    if field.type is float:
        low = -1e9 if field.name == "shift_factor" else 1e-30
        if type(value) in (int, float) and low <= value <= 1e9:
            return float(value)
        raise ValueError(f"{field.name} is {value!r}; it must be a number from {low} to 1e9")
    items = [value] if field.type is int else value
    high = _COUNT_LIMIT if field.name.startswith("num_") else _LIMIT
    low = -high if field.name == "vit_select_layer" else 1
    if (not isinstance(items, list) or not 1 <= len(items) <= 16
            or any(type(item) is not int or not low <= item <= high for item in items)):
        kind = "an integer" if field.type is int else "a list of integers"
        raise ValueError(f"{field.name} is {value!r}; it must be {kind} from {low} to {high}")
    return value if field.type is int else tuple(value)


def _restore(folder: pathlib.Path, shapes: Params) -> Params:
    """An Orbax tree of numpy arrays, after its shapes and dtypes have been found right."""
    try:
        stored = names.flatten(ocp.metadata(folder).metadata)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} is damaged or no Orbax checkpoint: {error}") from error
    wanted = names.flatten(shapes)
    faults = {
        "missing": wanted.keys() - stored.keys(),
        "unknown": stored.keys() - wanted.keys(),
        "misshapen": [f"{name} {stored[name].shape} (expected {wanted[name].shape})"
                      for name in wanted.keys() & stored.keys() if stored[name].shape != wanted[name].shape],
        "wrongly typed": [f"{name} {stored[name].dtype}" for name in stored
                          if np.dtype(stored[name].dtype).name not in DTYPES]}
    lines = [f"{kind}: {listing(sorted(group))}" for kind, group in faults.items() if group]
    if lines:
        raise ValueError(f"{str(folder)!r} does not fit its geometry:\n  " + "\n  ".join(lines))
    # Orbax returns numpy for numpy; the stand-ins occupy no memory.
    like = {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in stored.items()}
    try:
        return ocp.load(folder, names.unflatten(like))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} is damaged: {error}") from error
