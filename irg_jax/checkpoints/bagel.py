"""BAGEL's released layout, in and out.

    llm_config.json  vit_config.json  config.json     geometry
    tokenizer.json
    ema.safetensors  ae.safetensors                   network and autoencoder, as one file or shards

Every tensor of a source is used or refused, every parameter filled; all faults come in one message.
"""

import collections
import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np

from irg_jax.checkpoints import names
from irg_jax.checkpoints.model import TOKENIZER, Model, cast, load_tokenizer, new_folder, read_fields, read_json
from irg_jax.checkpoints.names import listing
from irg_jax.checkpoints.safetensors_files import SHARD_BYTES, Pending, TensorFiles, write_tensors
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Params

LLM_CONFIG, VIT_CONFIG, CONFIG = "llm_config.json", "vit_config.json", "config.json"
# What the code computes and no weight can change; a file that asks for something else is refused.
_FIXED = {
    LLM_CONFIG: {"hidden_act": "silu", "qk_norm": True, "tie_word_embeddings": False,
                 "rope_scaling": None, "use_sliding_window": False},
    VIT_CONFIG: {"hidden_act": "gelu_pytorch_tanh", "rope": False},
    CONFIG: {"visual_gen": True, "visual_und": True, "connector_act": "gelu_pytorch_tanh",
             "interpolate_pos": False},
}
_NETWORK, _AUTOENCODER = ("ema", "model"), ("ae",)   # the stems of their files, preferred first
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}   # nothing computes in float16


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Geometry from the three JSON files.

    `config.json` and each of its fields may be absent and then have the release's values.
    Raises: ValueError naming file and field.
    """
    folder = pathlib.Path(folder)
    values = {name: read_json(folder / name) for name in (LLM_CONFIG, VIT_CONFIG)}
    values[CONFIG] = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    for name, fixed in _FIXED.items():
        for key, value in fixed.items():
            if values[name].get(key, value) != value:
                raise ValueError(f"{folder / name}: {key} is {values[name][key]!r}; only {value!r} "
                                 "is supported")
    whole = values[CONFIG]
    vae_values = whole.get("vae_config", {})
    vae = read_fields(VAEConfig, vae_values, where=f"{folder / CONFIG}: vae_config")
    if vae_values.get("downsample", vae.downsample) != vae.downsample:
        raise ValueError(f"{folder / CONFIG}: vae_config: downsample {vae_values['downsample']!r} "
                         f"is not {vae.downsample}, which ch_mult {vae.ch_mult} gives")
    llm = read_fields(LLMConfig, values[LLM_CONFIG], where=str(folder / LLM_CONFIG))
    vit = read_fields(ViTConfig, values[VIT_CONFIG], where=str(folder / VIT_CONFIG))
    return read_fields(ModelConfig, whole, where=str(folder / CONFIG), llm=llm, vit=vit, vae=vae)


def import_folder(folder: str | pathlib.Path, *, dtype: str | None = None) -> Model:
    """Reads a whole folder, tensor by tensor; parameters are numpy arrays.

    Args: dtype is the network's, "float32" or "bfloat16"; by default each parameter keeps the
        file's (float16 becomes float32).
    Raises: ValueError naming every tensor that is missing, unknown, misshapen, wrongly typed, not
        finite or truncated, and position tables that are not the fixed ones.
    """
    folder = _existing(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    params, faults = _read_params(TensorFiles(folder, _NETWORK), names.model_slots(config),
                                  names.fixed_tables(config))
    vae, more = _read_params(TensorFiles(folder, _AUTOENCODER), names.vae_slots(config.vae), [])
    if faults or more:
        raise ValueError(f"{str(folder)!r} cannot be imported:\n  " + "\n  ".join(faults + more))
    return cast(Model(config, tokenizer, params, vae), dtype)


def export_folder(model: Model, out: str | pathlib.Path, *, dtype: str | None = None,
                  shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the layout to `out`, which is whole or absent.

    Args: dtype is the network's in the files, by default that of its parameters.
    Raises: ValueError if `out` is not absent or empty, or parameters are not finite.
    """
    model = cast(model, dtype)
    config = model.config
    params = names.flatten(jax.tree.map(np.asarray, model.params))
    vae = names.flatten(jax.tree.map(np.asarray, model.vae))
    bad = [path for leaves in (params, vae) for path, leaf in leaves.items()
           if not np.isfinite(leaf).all()]
    if bad:
        raise ValueError(f"the model has NaN or infinity in {listing(bad)}; it cannot be exported")
    network = [_pending(slot, params[slot.path]) for slot in names.model_slots(config)]
    dtype = params["embed"].dtype   # the tables have none of their own
    network += [_pending_table(table, dtype) for table in names.fixed_tables(config)]
    autoencoder = [_pending(slot, vae[slot.path]) for slot in names.vae_slots(config.vae)]
    with new_folder(out) as folder:
        for name, values in _config_files(config).items():
            (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(str(folder / TOKENIZER))
        write_tensors(folder, _NETWORK[0], network, shard_bytes=shard_bytes)
        write_tensors(folder, _AUTOENCODER[0], autoencoder, shard_bytes=shard_bytes)


def source_digests(folder: str | pathlib.Path) -> dict[str, str]:
    """sha256 of every file that `import_folder` reads. Raises ValueError if there is no folder."""
    folder = _existing(folder)
    texts = [folder / name for name in (LLM_CONFIG, VIT_CONFIG, CONFIG, TOKENIZER)]
    files = [file for file in texts if file.is_file()]
    for stems in (_NETWORK, _AUTOENCODER):
        files += TensorFiles(folder, stems).files
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def _existing(folder: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; give one in the layout of the BAGEL "
                         f"release ({LLM_CONFIG}, ema.safetensors, ae.safetensors, ...)")
    return folder


class _Faults:
    """What is wrong with the tensors of one source, by kind."""

    def __init__(self, source: str):
        self.names: set[str] = set()
        self._source = source
        self._kinds: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, name: str, detail: str = "") -> None:
        self.names.add(name)
        self._kinds[kind].append(f"{name} {detail}".strip())

    def sentences(self) -> list[str]:
        return [f"{self._source}: {kind}: {listing(group)}" for kind, group in self._kinds.items()]


def _read_params(files: TensorFiles, slots: list[names.Slot],
                 tables: list[names.FixedTable]) -> tuple[Params, list[str]]:
    """The parameters in `files`, and a sentence for each kind of fault found there."""
    if files.faults and not files.entries:   # no file could be read: its tensors are not missing
        return {}, files.faults
    faults, params = _Faults(files.name), {}
    depth = collections.Counter(slot.path for slot in slots)
    _check_headers(files, [*slots, *tables], faults)
    for slot in slots:
        if slot.name not in files.entries or slot.name in faults.names:
            continue
        tensor = files.read(slot.name)
        if not np.isfinite(tensor).all():
            faults.add("NaN or infinity", slot.name)
        part, dtype = slot.to_ours(tensor), np.dtype(_DTYPES[files.entries[slot.name].dtype])
        if slot.layer is None:
            params[slot.path] = np.ascontiguousarray(part, dtype)
            continue
        if slot.path not in params:
            params[slot.path] = np.empty((depth[slot.path], *part.shape), dtype)
        stack = params[slot.path]
        if stack.dtype != dtype:
            faults.add("wrongly typed", slot.name, f"{dtype}, other layers {stack.dtype}")
        stack[slot.layer] = part
    for table in tables:
        if table.name in files.entries and table.name not in faults.names:
            _check_table(files.read(table.name), table, faults)
    return names.unflatten(params), files.faults + faults.sentences()


def _check_headers(files: TensorFiles, parts: list[names.Slot | names.FixedTable],
                   faults: _Faults) -> None:
    shapes = {part.name: part.shape for part in parts}
    for name in shapes:
        if name not in files.entries:
            faults.add("missing", name)
    for name, entry in files.entries.items():
        if name not in shapes:
            faults.add("unknown", name)
        elif entry.shape != shapes[name]:
            faults.add("misshapen", name, f"{list(entry.shape)}, expected {list(shapes[name])}")
        elif entry.dtype not in _DTYPES:
            faults.add("wrongly typed", name, f"{entry.dtype}, expected one of {' '.join(_DTYPES)}")


def _check_table(source: np.ndarray, table: names.FixedTable, faults: _Faults) -> None:
    """The formula must explain the source's table, up to the rounding of its dtype."""
    tolerance = max(1e-6, float(ml_dtypes.finfo(source.dtype).eps) / 2)
    if not np.abs(source.astype(np.float32) - table.build()).max() <= tolerance:   # NaN fails too
        faults.add("not the fixed position table", table.name)


def _pending(slot: names.Slot, parameter: np.ndarray) -> Pending:
    size = math.prod(slot.shape) * parameter.dtype.itemsize
    return Pending(slot.name, size, lambda: np.ascontiguousarray(slot.to_torch(parameter)))


def _pending_table(table: names.FixedTable, dtype: np.dtype) -> Pending:
    size = math.prod(table.shape) * dtype.itemsize
    return Pending(table.name, size, lambda: table.build().astype(dtype))


def _config_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The three JSON files, with the few fields besides ours that the original's code reads."""
    fields = dataclasses.asdict(config)
    llm, vit, vae = (fields.pop(part) for part in ("llm", "vit", "vae"))
    llm |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    vit |= {"model_type": "siglip_vision_model",
            "image_size": config.vit_max_num_patch_per_side * config.vit.patch_size}
    fields["vae_config"] = vae | {"downsample": config.vae.downsample}
    return {LLM_CONFIG: llm | _FIXED[LLM_CONFIG], VIT_CONFIG: vit | _FIXED[VIT_CONFIG],
            CONFIG: fields | _FIXED[CONFIG]}
