"""What decides the batches, field by field, so that a refused resume can say what changed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data_pipelines.config import DataConfig
from data_pipelines.costs import CostTable
from data_pipelines.tokenizer import Tokenizer

# What may change between two runs that resume one another: how the same batches are read.
_READING = ("source", "digests", "stage_dir", "stage_steps", "workers", "read_threads", "prefetch",
            "cache_mib", "index_dir", "max_bad_share", "accept_changed_data")


def describe_data(config: DataConfig, tokenizer: Tokenizer, tables: Mapping[str, CostTable],
                  digests: Mapping[str, str]) -> dict[str, Any]:
    """Flat and small: `tokenizer`, `data.<group>` and `config.<field>` -> a digest or a plain value.

    Args:
        tables: the costs of each group.
        digests: of each group's files.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in _READING}
    fields["moments"] = bool(config.moments)  # wherever they are; their manifest names the data
    fields["groups"] = {group.pop("name"): group for group in fields["groups"]}
    del fields["system_prompt"]
    for group in config.groups:  # by their words: a file may move
        del fields["groups"][group.name]["system_prompt"]
        if prompt := config.system_prompt_of(group):
            fields["groups"][group.name]["system_prompt"] = _digest(prompt.encode())
    data = {name: _digest(digests[name].encode(), table.items.tobytes(), table.offsets.tobytes())
            for name, table in tables.items()}
    return flatten({"tokenizer": _digest(tokenizer.fingerprint.encode()), "data": data, "config": fields})


def digest_values(values: Any) -> str:
    """Digest of anything that JSON can write."""
    return _digest(json.dumps(values).encode())


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings -> one, its keys joined by dots."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{path}{name}.") if isinstance(value, dict) and value else {path + name: value}
    return flat


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """'name: saved -> current' for every entry that differs."""
    show = lambda values, name: repr(values[name]) if name in values else "absent"
    return [f"{name}: {show(saved, name)} -> {show(current, name)}"
            for name in sorted(saved.keys() | current.keys())
            if show(saved, name) != show(current, name)]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
