"""Configuration at the door: a ConfigDict becomes nested frozen dataclasses, once, and typos raise.

    config = load_config("configs/shapes_stage1.py", overrides={"data.seed": 7})
    data = from_config_dict(DataConfig, config.data, path="data")

Nothing behind this door reads a ConfigDict, so every field that exists is documented here.
"""

import dataclasses
import difflib
import functools
import importlib.util
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import ml_collections

from data_pipelines.batch import PIXELS_PER_TOKEN
from data_pipelines.system_prompts import load_system_prompt

T = TypeVar("T")


def _require_positive(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be positive")


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """The resize rule of one image encoder; sizes in pixels."""

    stride: int                          # both sides become multiples of this
    max_size: int                        # the longest side ends at or below this
    min_size: int                        # the shortest side is scaled up to this first
    max_pixels: int = 14 * 14 * 9 * 1024  # width * height, divided by the images that share it

    def __post_init__(self):
        _require_positive(self, ("stride", "max_size", "min_size", "max_pixels"))
        if self.max_size < self.stride or self.max_size % self.stride:
            raise ValueError(f"max_size {self.max_size} must be a multiple of stride {self.stride}")


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """One group of records: a learning mode or data set, and its share of the mixture."""

    name: str                   # the mode; also the folder below the source unless `folder` is set
    weight: float = 1.0         # records drawn, relative to the other groups
    is_mandatory: bool = False  # every pack starts with one record of this group
    kind: Literal["conversation", "text_to_image", "editing", "vision_language"] = "conversation"
    folder: str = ""            # below <source>/<split>; empty: the name
    vae_transform: ImageTransform | None = None  # instead of the mixture's
    vit_transform: ImageTransform | None = None
    system_prompt: str | None = None   # instead of the mixture's; "" for none

    def __post_init__(self):
        if self.weight < 0 or (self.weight == 0 and not self.is_mandatory):
            raise ValueError(f"group {self.name!r} has weight {self.weight}; use a positive "
                             "one, or remove the group")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """From a built data set to packed batches."""

    source: str                        # folder that holds <split>/<group>/*.parquet
    groups: tuple[GroupConfig, ...]    # the mixture; in a config also {name: {weight, ...}}
    moments: str = ""                  # folder of `python -m irg_jax.moments`; replaces VAE pixels
    split: str = "train"               # folder below source; "" for the released layout
    seed: int = 42                     # fixes order, packs, dropout and timesteps

    packs_per_step: int = 8            # B of the global batch; never derived from the device count
    text_tokens: int = 8192            # T: text stream of a pack, image brackets included
    vit_tokens: int = 16384            # V: ViT patches of a pack
    latent_tokens: int = 16384         # G: latent tokens of a pack
    images: int = 8                    # N: image slots of a pack (noised and clean VAE images)
    max_tokens_per_record: int = 32768  # a longer one is oversize, even if a pack holds it
    oversize: Literal["bad", "drop"] = "bad"  # counts as a bad record; drop: left out at will
    lookahead: int = 32                # records of each group that compete for a place in a pack
    mixture_slack: int = 4             # records a group may run ahead of its weight to fill a pack
    patience: int = 8                  # packs that may pass over a record before it opens one

    vae_transform: ImageTransform = ImageTransform(stride=16, max_size=1024, min_size=512)
    vit_transform: ImageTransform = ImageTransform(stride=14, max_size=980, min_size=378)
    latent_patch: int = PIXELS_PER_TOKEN  # pixels a side of a latent token
    vit_patch: int = 14                # pixels a side of a ViT patch
    max_latent_size: int = 64          # side of the latent position table, in tokens
    vit_max_side: int = 70             # side of the ViT position table, in patches

    system_prompt: str = ""            # text, or @file, that opens every sample; for records without one
    text_dropout: float = 0.0          # probability that a text vanishes (loss-bearing text too)
    vit_dropout: float = 0.0           # probability that a ViT condition is dropped
    vae_dropout: float = 0.3           # probability that a clean VAE condition is dropped
    ce_reweight: bool = False          # weight a text's tokens by 1 / sqrt(its loss tokens)

    unknown_role: Literal["error", "ignore"] = "error"  # turns that are not user or assistant
    max_bad_share: float = 0.001       # of a group's records may be bad; one more ends the run
    max_text_chars: int = 65_536       # of one text part
    max_image_bytes: int = 32 * 2**20  # of one encoded image
    max_image_pixels: int = 2**25      # width * height of one image, checked before decoding

    read_threads: int = 4              # threads that decode and assemble packs ahead of the step
    workers: int = 0                   # processes that do so instead, one thread each
    prefetch: int = 4                  # batches of this process held ready
    cache_mib: int = 256               # of parquet row groups kept in memory, for each group
    index_dir: str = ""                # keeps cost tables and plan between runs; "" for nowhere
    digests: str = ""                  # file of `check --write --digests`; "" looks in the source
    stage_dir: str = ""                # `source` is copied here before the start; "" reads it in place
    stage_steps: int = 0               # copy of shards only what a host reads in so many steps; 0: all
    accept_changed_data: bool = False  # resume although what decides the batches has changed

    def __post_init__(self):
        _require_positive(self, (
            "packs_per_step", "text_tokens", "max_tokens_per_record", "lookahead", "patience",
            "latent_patch", "vit_patch", "max_latent_size", "vit_max_side", "max_text_chars",
            "max_image_bytes", "max_image_pixels", "read_threads", "prefetch", "cache_mib"))
        for name in ("vit_tokens", "latent_tokens", "images", "mixture_slack", "seed", "workers",
                     "stage_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("text_dropout", "vit_dropout", "vae_dropout", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.stage_steps and not self.stage_dir:
            raise ValueError(f"stage_steps is {self.stage_steps}, but stage_dir is empty; name the folder")
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"groups are {names}; name at least one group, and each once")
        for where, owner in (("", self), *((f"groups.{group.name}.", group) for group in self.groups)):
            for name, patch in (("vae_transform", "latent_patch"), ("vit_transform", "vit_patch")):
                transform = getattr(owner, name)    # a group may have none of its own
                if transform and transform.stride % getattr(self, patch):
                    raise ValueError(f"{where}{name}.stride must be a multiple of {patch}")

    @property
    def canvas(self) -> int:
        """Side of the square, in latent tokens, that holds any VAE image of the mixture."""
        transforms = [group.vae_transform or self.vae_transform for group in self.groups]
        return max(transform.max_size for transform in transforms) // self.latent_patch

    def system_prompt_of(self, group: GroupConfig) -> str:
        """The text that opens every sample of a group. Raises: ValueError if its file cannot be read."""
        field = self.system_prompt if group.system_prompt is None else group.system_prompt
        if field not in self._system_prompts:
            self._system_prompts[field] = load_system_prompt(field)
        return self._system_prompts[field]

    @functools.cached_property
    def _system_prompts(self) -> dict[str, str]:
        return {}  # by field; a file is read once, and travels to worker processes as it was then


def load_config(path: str, *, overrides: Mapping[str, Any] | None = None) -> Any:
    """Runs `get_config()` of a config file; `file.py:arg` calls `get_config(arg)`.

    Args:
        path: a Python file.
        overrides: dotted field name -> value, also of fields that the file leaves to their defaults;
            whether a field exists is checked by `from_config_dict`.
    Returns: an ml_collections.ConfigDict.
    Raises: ValueError if the file is missing or has no get_config.
    """
    file, separator, argument = path.partition(".py:")
    file = file + ".py" if separator else file
    if not os.path.isfile(file):
        raise ValueError(f"config file {file!r} does not exist")
    spec = importlib.util.spec_from_file_location("config_file", file)
    if spec is None:
        raise ValueError(f"config file {file!r} is no Python file; a run's config.json is but a record of what "
                         "it was started with")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {file!r} defines no get_config()")
    config = module.get_config(argument) if separator else module.get_config()
    for name, value in (overrides or {}).items():
        _override(config, name, value)
    return config


def from_config_dict(cls: type[T], config: Any, path: str = "") -> T:
    """Converts a ConfigDict or dict to the frozen dataclass `cls`, nested ones included.

    Args:
        cls: a dataclass; fields may be bool, int, float, str, Literal, Optional, tuple, dict or
            dataclasses. A tuple of dataclasses that have a `name` may also be written as a mapping
            from name to the other fields, so that one of them can be overridden by name.
        config: the values; absent fields take the dataclass defaults.
        path: dotted path of `config` in the whole configuration, for messages.
    Raises: ValueError naming the full path of an unknown, missing, mistyped or invalid field.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = _items(config, path)
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown config field {_join(path, key)!r}{nearest(key, fields)}")
    required = [name for name, field in fields.items() if name not in values
                and field.default is field.default_factory is dataclasses.MISSING]
    if required:
        raise ValueError(f"config field {_join(path, required[0])!r} is missing and has no default")
    converted = {key: _convert(hints[key], value, _join(path, key))
                 for key, value in values.items()}
    try:
        return cls(**converted)
    except ValueError as error:
        raise ValueError(f"config {path or cls.__name__}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, or a ValueError that names `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return to_plain(value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"config field {path!r} is {value!r}; use one of {list(arguments)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        if len(options) != 1:
            raise TypeError(f"{path}: unions other than Optional are not supported")
        return _convert(options[0], value, path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_config_dict(hint, value, path)
    if origin is dict:
        return {key: _convert(arguments[1], item, _join(path, key))
                for key, item in _items(value, path).items()}
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    return _convert_scalar(hint, value, path)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if _is_mapping(value) and dataclasses.is_dataclass(arguments[0]):
        return tuple(from_config_dict(arguments[0], {"name": key, **_items(item, _join(path, key))},
                                      _join(path, key))
                     for key, item in _items(value, path).items())
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"config field {path!r} is {value!r}; expected a tuple")
    variadic = arguments[-1] is Ellipsis
    if not variadic and len(value) != len(arguments):
        raise ValueError(f"config field {path!r} has {len(value)} entries; "
                         f"expected {len(arguments)}")
    hints = [arguments[0]] * len(value) if variadic else arguments
    return tuple(_convert(hint, item, f"{path}[{i}]")
                 for i, (hint, item) in enumerate(zip(hints, value)))


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    # bool is an int in Python; a config that says True where a number belongs is a mistake.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if isinstance(value, hint) and (hint is not int or is_number):
        return value
    raise ValueError(f"config field {path!r} is {value!r} ({type(value).__name__}); "
                     f"expected {hint.__name__}")


def _override(config: Any, name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for key in parents:
        if key not in config:
            config[key] = ml_collections.ConfigDict()
        config = config[key]
        if not _is_mapping(config):
            raise ValueError(f"config field {name!r} cannot be set: {key!r} is {config!r} and has no fields")
    with config.ignore_type():  # types are checked at the door, against the dataclass
        config[leaf] = value


def _is_mapping(value: Any) -> bool:
    return isinstance(value, (Mapping, ml_collections.ConfigDict))


def to_plain(value: Any) -> Any:
    """Mappings of all kinds as dicts."""
    if not _is_mapping(value):
        return value
    return {key: to_plain(value[key]) for key in value}


def _items(config: Any, path: str) -> dict[str, Any]:
    if not _is_mapping(config):
        raise ValueError(f"config field {path!r} is {config!r}; expected fields and values")
    return {key: config[key] for key in config}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def nearest(key: str, known: Iterable[str]) -> str:
    """What a message about an unknown key ends with."""
    match = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known fields: {', '.join(known)}"


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """A data set to be generated: how many records of which modes."""

    counts: dict[str, int]          # records of each mode
    seed: int = 0
    side: int = 64                  # pixels of the square images
    num_heldout_prompts: int = 300
    drafts: str = ""                # of `irg_jax.draft`: first images of improving records; "": rendered
    rows_per_file: int = 1000
    rows_per_group: int = 16        # small row groups keep random access cheap

    def __post_init__(self):
        _require_positive(self, ("side", "rows_per_file", "rows_per_group"))
        if not self.counts or min(self.counts.values()) <= 0:
            raise ValueError(f"counts are {self.counts}; name at least one mode, each with a "
                             "positive count")
        if self.num_heldout_prompts < 0 or self.seed < 0:
            raise ValueError("num_heldout_prompts and seed cannot be negative")
