"""From a checkpoint and settings to a generator, and what says which these were."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from data_pipelines.system_prompts import load_system_prompt, name_system_prompt
from irg_jax.checkpoints.model import Model, load_model
from irg_jax.checkpoints.store import digest
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.trajectory import Generator

T = TypeVar("T")
RELEASED_VOCAB = 152064  # tells released weights from a model of one's own


def load_generator(path: str, config: SamplingConfig, *, prompts: Mapping[str, str],
                   mesh: jax.sharding.Mesh | None = None) -> tuple[Generator, dict[str, str]]:
    """A generator with the weights of a checkpoint, and which these are: path and sha256.

    Args: prompts are checked before anything is compiled; keys name them in messages. For mesh see `Generator`.
    Raises: ValueError if there is no sound checkpoint, it has no tokenizer, or a prompt holds a
        control token.
    """
    model = load_model(path)
    if model.tokenizer is None:
        raise ValueError(f"{path!r} has no tokenizer.json; convert the model again, with it beside "
                         "the weights")
    for where, text in prompts.items():
        model.tokenizer.reject_control_tokens(text, where=where)
    prompt = load_system_prompt(config.system_prompt)
    name = name_system_prompt(prompt)
    logging.info("system prompt: %s (%d characters)", name or "own wording", len(prompt))
    if name is None and model.config.llm.vocab_size == RELEASED_VOCAB:
        logging.warning("released weights run with another system prompt than they were trained "
                        "with; set system_prompt to @FILE with the published text")
    cache_programs()
    return Generator(model, config, mesh=mesh), {"path": str(path), "sha256": _digest_weights(model)}


def cache_programs() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.

    Not those of CPUs: they take seconds, and XLA may load one there that was made for another processor
    (github.com/jax-ml/jax/issues/38445).
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "irg_jax", "programs"))


def in_batches(items: Sequence[T], size: int) -> Iterator[tuple[Sequence[T], list[T]]]:
    """(batch, the same filled up to `size`): one shape for all, so one compilation."""
    for start in range(0, len(items), size):
        batch = items[start:start + size]
        yield batch, [*batch, *[batch[-1]] * (size - len(batch))]


def describe_settings(config: SamplingConfig) -> dict[str, Any]:
    """What decides how an image looks, as JSON; how many are drawn at once does not."""
    fields = dataclasses.asdict(config)
    del fields["batch_size"]
    fields["system_prompt"] = load_system_prompt(config.system_prompt)
    return json.loads(json.dumps(fields))


def _digest_weights(model: Model) -> str:
    leaves = jax.tree_util.tree_leaves_with_path({"model": model.params, "vae": model.vae})
    whole = hashlib.sha256()
    for path, leaf in leaves:
        whole.update(f"{jax.tree_util.keystr(path)} {digest(leaf)}\n".encode())
    return whole.hexdigest()
