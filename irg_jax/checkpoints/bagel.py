"""BAGEL's released layout, in and out.

    llm_config.json  vit_config.json  config.json     geometry
    tokenizer.json                                    vocab.json, merges.txt, tokenizer_config.json: written too
    ema.safetensors  ae.safetensors                   network and autoencoder; shards are read too

Every tensor of a source is used or refused, every parameter filled; all faults come in one message.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from data_pipelines.tokenizer import Tokenizer
from irg_jax.checkpoints import names
from irg_jax.checkpoints.model import (
    TOKENIZER,
    Model,
    cast,
    join_leaves,
    list_leaves,
    load_tokenizer,
    model_slots,
    new_folder,
    read_fields,
    read_json,
)
from irg_jax.checkpoints.names import listing
from irg_jax.checkpoints.safetensors_files import Pending, TensorFiles, blocks, write_tensors
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig

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
    """Reads a whole folder into numpy arrays.

    Args: dtype is the network's, "float32" or "bfloat16"; by default each parameter keeps the
        file's (float16 becomes float32).
    Raises: ValueError as `open_folder` and its leaves do.
    """
    source = open_folder(folder)
    leaves = dict(source.leaves)
    return cast(Model(source.config, source.tokenizer, *join_leaves(leaves, model_slots(source.config))), dtype)


class Source(NamedTuple):
    """A released folder that is open: its leaves are those of a model checkpoint, given as they are read.

    The leaves raise ValueError, after the last, naming every tensor that is missing, unknown, misshapen,
    wrongly typed, not finite or truncated, and position tables that are not the fixed ones; if that is
    known from the headers, none is given at all. `digests`, the sha256 of every file, is whole after the last.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    leaves: Iterator[tuple[str, np.ndarray]]
    digests: dict[str, str]


def open_folder(folder: str | pathlib.Path) -> Source:
    """Reads geometry and tokenizer, and prepares to read the rest. Raises: ValueError if one is not sound."""
    folder = _existing(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    tables = {"model": names.fixed_tables(config), "vae": []}
    parts = [_Part(part, TensorFiles(folder, stems), slots, tables[part]) for stems, (part, slots)
             in zip((_NETWORK, _AUTOENCODER), model_slots(config).items(), strict=True)]
    digests = _text_digests(folder)
    return Source(config, tokenizer, _read_leaves(folder, parts, digests), digests)


def export_folder(model: Model, out: str | pathlib.Path, *, dtype: str | None = None) -> None:
    """Writes the layout to `out`, which is whole or absent; every file is where BAGEL's own code looks for it.

    Args: dtype is the network's in the files, by default that of its parameters.
    Raises: ValueError if `out` is not absent or empty, or parameters are not finite.
    """
    leaves = dict(list_leaves(model))
    export_leaves(out, model.config, model.tokenizer, {name: leaf.dtype for name, leaf in leaves.items()},
                  lambda paths: map(leaves.__getitem__, paths), dtype=dtype)


def export_leaves(out: str | pathlib.Path, config: ModelConfig, tokenizer: Tokenizer | None,
                  dtypes: dict[str, np.dtype], read: Callable[[list[str]], Iterator[np.ndarray]], *,
                  dtype: str | None = None) -> None:
    """`export_folder` of a model checkpoint's leaves; `read` gives those of some paths one by one, in order."""
    bad: list[str] = []
    with new_folder(out) as folder:
        for name, values in _config_files(config).items():
            (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(str(folder / TOKENIZER))
            tokenizer.save_parts(folder)
        for stems, (part, slots) in zip((_NETWORK, _AUTOENCODER), model_slots(config).items(), strict=True):
            own = dtype if part == "model" else None   # the autoencoder keeps its dtype
            pending = [Pending(slot.name, slot.shape, np.dtype(own or dtypes[f"{part}.{slot.leaf}"]))
                       for slot in slots]
            sources: dict[str, Any] = {slot.name: slot for slot in slots}
            if part == "model":
                tables = names.fixed_tables(config)
                pending += [Pending(table.name, table.shape, np.dtype(own or dtypes["model.embed"]))
                            for table in tables]   # which have no dtype of their own
                sources |= {table.name: table for table in tables}
            write_tensors(folder, stems[0], pending, functools.partial(_make, part, sources, read, bad))
        if bad:
            raise ValueError(f"the model has NaN or infinity in {listing(dict.fromkeys(bad))}; it cannot be "
                             "exported")


def source_digests(folder: str | pathlib.Path) -> dict[str, str]:
    """sha256 of every file that `import_folder` reads. Raises ValueError if there is no folder."""
    folder = _existing(folder)
    weights = [file for stems in (_NETWORK, _AUTOENCODER) for file in TensorFiles(folder, stems).files]
    return _text_digests(folder) | _hash_files(weights)


def _text_digests(folder: pathlib.Path) -> dict[str, str]:
    texts = [folder / name for name in (LLM_CONFIG, VIT_CONFIG, CONFIG, TOKENIZER)]
    return _hash_files([file for file in texts if file.is_file()])


def _hash_files(files: Sequence[pathlib.Path]) -> dict[str, str]:
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


class _Part(NamedTuple):
    """The network or the autoencoder of a source, and what must be in its files."""

    name: str
    files: TensorFiles
    slots: list[names.Slot]
    tables: list[names.FixedTable]


def _read_leaves(folder: pathlib.Path, parts: Sequence[_Part],
                 digests: dict[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    found = {part.name: _Faults(part.files.name) for part in parts}
    for part in parts:
        if part.files.entries or not part.files.faults:   # else no file could be read: no tensor is missing
            _check_headers(part, found[part.name])
    is_refused = any(part.files.faults or found[part.name].names for part in parts)
    for part in parts:
        faults = found[part.name]
        slots = {slot.name: slot for slot in part.slots}
        tables = {table.name: table for table in part.tables}
        for name, rows in part.files.tensors():
            if name in faults.names:
                continue
            if name in tables:
                _check_table(rows, tables[name], faults)
                continue
            leaf = np.empty(slots[name].our_shape, _DTYPES[part.files.entries[name].dtype])
            if not _fill(slots[name].to_torch(leaf), rows):
                faults.add("NaN or infinity", name)
            elif not is_refused:
                yield f"{part.name}.{slots[name].leaf}", leaf
            del leaf   # while the next tensor is read
        digests |= part.files.digests
    sentences = [line for part in parts for line in part.files.faults + found[part.name].sentences()]
    if sentences:
        raise ValueError(f"{str(folder)!r} cannot be imported:\n  " + "\n  ".join(sentences))


def _check_headers(part: _Part, faults: _Faults) -> None:
    entries = part.files.entries
    shapes = {each.name: each.shape for each in (*part.slots, *part.tables)}
    for name in shapes:
        if name not in entries:
            faults.add("missing", name)
    for name, entry in entries.items():
        if name not in shapes:
            faults.add("unknown", name)
        elif entry.shape != shapes[name]:
            faults.add("misshapen", name, f"{list(entry.shape)}, expected {list(shapes[name])}")
        elif entry.dtype not in _DTYPES:
            faults.add("wrongly typed", name, f"{entry.dtype}, expected one of {' '.join(_DTYPES)}")
    first: dict[str, str] = {}   # the layers of a parameter are one array in memory
    for slot in part.slots:
        if slot.name in entries and slot.name not in faults.names:
            ours = _DTYPES[entries[slot.name].dtype]
            if first.setdefault(slot.path, ours) != ours:
                faults.add("wrongly typed", slot.name, f"{ours}, other layers {first[slot.path]}")


def _fill(tensor: np.ndarray, rows: Iterator[np.ndarray]) -> bool:
    """Copies blocks of rows into a whole tensor, contiguous or not; whether all of it is finite."""
    place, finite = 0, True
    for block in rows:
        finite &= _is_finite(block)
        tensor[place:place + len(block)] = block
        place += len(block)
    return finite


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype == ml_dtypes.bfloat16:   # by its bits: ml_dtypes would look at the values one by one
        return bool((array.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7F80)
    return bool(np.isfinite(array).all())


def _check_table(rows: Iterator[np.ndarray], table: names.FixedTable, faults: _Faults) -> None:
    """The formula must explain the source's table, up to the rounding of its dtype."""
    source = np.concatenate([block.copy() for block in rows])
    tolerance = max(1e-6, float(ml_dtypes.finfo(source.dtype).eps) / 2)
    if not np.abs(source.astype(np.float32) - table.build()).max() <= tolerance:   # NaN fails too
        faults.add("not the fixed position table", table.name)


def _make(part: str, sources: dict[str, Any], read: Callable[[list[str]], Iterator[np.ndarray]], bad: list[str],
          order: list[tuple[str, np.dtype]]) -> Iterator[np.ndarray]:
    """The tensors of some names, in the torch layout; notes parameters that are not finite in `bad`."""
    leaves = iter(read([f"{part}.{sources[name].leaf}" for name, _ in order
                        if isinstance(sources[name], names.Slot)]))
    for name, dtype in order:
        source = sources[name]
        if isinstance(source, names.FixedTable):
            yield source.build().astype(dtype)
            continue
        leaf = np.asarray(next(leaves), dtype)
        if not all(map(_is_finite, blocks(leaf))):
            bad.append(source.path)
        yield source.to_torch(leaf)
        del leaf   # while the next is read


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
