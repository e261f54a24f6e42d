"""BAGEL's released layout: three JSON files, a tokenizer and two safetensors files, in and out."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from data_pipelines.tokenizer import Tokenizer
from irg_jax.checkpoints import names
from irg_jax.checkpoints.model import Model
from irg_jax.checkpoints.safetensors_files import DTYPES, TensorFiles, listing
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Params

# What the code computes and no weight can change; a file that asks for anything else is refused.
_LLM_FIXED = {"hidden_act": "silu", "qk_norm": True, "tie_word_embeddings": False, "rope_scaling": None,
              "use_sliding_window": False}
_VIT_FIXED = {"hidden_act": "gelu_pytorch_tanh", "rope": False}
_BAGEL_FIXED = {"visual_gen": True, "visual_und": True, "connector_act": "gelu_pytorch_tanh",
                "interpolate_pos": False}
_LIMIT, _COUNT_LIMIT = 10**7, 1000   # beyond any real model, below what would exhaust memory


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Geometry from `llm_config.json`, `vit_config.json` and `config.json`.

    `config.json` may be absent and its fields too: they then have the release's values.
    Raises ValueError naming file and field.
    """
    folder = pathlib.Path(folder)
    llm = _read_json(folder / "llm_config.json")
    vit = _read_json(folder / "vit_config.json")
    whole = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    vae = whole.get("vae_config", {})
    for where, values, fixed in (("llm_config.json", llm, _LLM_FIXED), ("vit_config.json", vit, _VIT_FIXED),
                                 ("config.json", whole, _BAGEL_FIXED)):
        for key, value in fixed.items():
            if values.get(key, value) != value:
                raise ValueError(f"{folder / where}: {key} is {values[key]!r}; only {value!r} is supported")
    config = ModelConfig(
        llm=read_fields(LLMConfig, llm, where=str(folder / "llm_config.json")),
        vit=read_fields(ViTConfig, vit, where=str(folder / "vit_config.json")),
        vae=read_fields(VAEConfig, vae, where=f"{folder / 'config.json'}: vae_config"),
        **scalar_fields(ModelConfig, whole, where=str(folder / "config.json")))
    if "downsample" in vae and vae["downsample"] != config.vae.downsample:
        raise ValueError(f"{folder / 'config.json'}: vae_config: downsample is {vae['downsample']!r}, but "
                         f"ch_mult {config.vae.ch_mult} gives {config.vae.downsample}")
    return config


def import_folder(folder: str | pathlib.Path, *, dtype: str | None = None) -> Model:
    """Reads a released-layout folder whole and checked; parameters are numpy arrays.

    Args: dtype, "float32" or "bfloat16", casts; without it each parameter keeps the file's (float16, which
    nothing here computes in, becomes float32).
    Raises: ValueError naming every missing, extra, misshapen, wrongly typed, non-finite or truncated tensor.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give one in the layout of the BAGEL release")
    config = read_config(folder)
    path, tokenizer = folder / "tokenizer.json", None
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path), vocab_size=config.llm.vocab_size)
    model, vae = TensorFiles(folder, ("ema", "model")), TensorFiles(folder, ("ae",))
    params, faults = _read_params(model, names.model_slots(config), names.fixed_tables(config), dtype)
    vae_params, vae_faults = _read_params(vae, names.vae_slots(config.vae), [], dtype)
    if faults or vae_faults:
        raise ValueError(f"{str(folder)!r} cannot be imported:\n  " + "\n  ".join(faults + vae_faults))
    return Model(config, tokenizer, params, vae_params)


def read_fields(cls: type, values: Any, *, where: str) -> Any:
    """An instance of a config dataclass from untrusted JSON; fields it does not have are left alone."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object of fields, not {values!r}")
    missing = [field.name for field in dataclasses.fields(cls)
               if field.default is dataclasses.MISSING and field.name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**scalar_fields(cls, values, where=where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where not in str(error) else str(error)) from error


def scalar_fields(cls: type, values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The fields of `cls` that are numbers or lists of them and that `values` has, checked."""
    fields = [field for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.type)]
    return {field.name: _checked(field, values[field.name], where) for field in fields
            if field.name in values}


def _checked(field: dataclasses.Field, value: Any, where: str) -> Any:
    if field.type is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        raise ValueError(f"{where}: {field.name} is {value!r}; it must be a finite number")
    items = [value] if field.type is int else value
    limit = _COUNT_LIMIT if field.name.startswith("num_") else _LIMIT
    low = -limit if field.name == "vit_select_layer" else 1
    if (not isinstance(items, list) or not 1 <= len(items) <= 16
            or any(type(item) is not int or not low <= item <= limit for item in items)):
        kind = "an integer" if field.type is int else "a list of integers"
        raise ValueError(f"{where}: {field.name} is {value!r}; it must be {kind} from {low} to {limit}")
    return value if field.type is int else tuple(value)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, not {type(values).__name__}")
    return values


def _read_params(files: TensorFiles, slots: list[names.Slot], tables: list[names.FixedTable],
                 dtype: str | None) -> tuple[Params, list[str]]:
    """Parameters, tensor by tensor, and the sentences about all faults of these files."""
    if not files.entries:
        return {}, files.faults
    shapes = {part.name: part.shape for part in (*slots, *tables)}
    bad = _header_faults(files, shapes, optional={table.name for table in tables})
    counts: dict[str, int] = {}
    for slot in slots:
        counts[slot.path] = counts.get(slot.path, 0) + 1
    params: dict[str, np.ndarray] = {}
    unsound = {name for group in bad.values() for name in group}
    for slot in slots:
        if slot.name not in files.entries or any(slot.name in group for group in bad.values()):
            continue
        tensor = files.read(slot.name)
        if not np.isfinite(tensor).all():
            bad["not finite"].append(slot.name)
        part = slot.to_ours(tensor)
        target = np.dtype(_target_dtype(tensor, dtype))
        if slot.layer is None:
            params[slot.path] = np.ascontiguousarray(part, target)
            continue
        if slot.path not in params:
            params[slot.path] = np.empty((counts[slot.path], *part.shape), target)
        if params[slot.path].dtype != target:
            bad["wrongly typed"].append(slot.name)
        params[slot.path][slot.layer] = part
    for table in tables:
        if table.name in files.entries and table.name not in unsound:
            source = files.read(table.name)
            tolerance = max(1e-6, float(ml_dtypes.finfo(source.dtype).eps) / 2)
            if not np.abs(source.astype(np.float32) - table.build()).max() <= tolerance:
                bad["not the fixed position table"].append(table.name)
    name = files.path.name
    faults = [f"{name}: {kind}: {listing(group)}" for kind, group in bad.items() if group]
    return names.unflatten(params), files.faults + faults


def _header_faults(files, shapes, optional):
    entries = files.entries
    return {
        "missing": [n for n in shapes if n not in entries and n not in optional],
        "unknown": [n for n in entries if n not in shapes],
        "misshapen": [n for n in entries if n in shapes and entries[n].shape != shapes[n]],
        "wrongly typed": [n for n in entries if n in shapes and entries[n].dtype not in DTYPES],
        "not finite": [], "not the fixed position table": []}


def _target_dtype(tensor, dtype):
    return dtype or ("float32" if tensor.dtype == np.float16 else tensor.dtype)
