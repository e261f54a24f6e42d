"""How a run starts on one host or several: they meet, compare what they are about to run, and start JAX."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import pathlib
import platform
from collections.abc import Iterator, Sequence

import jax

from data_pipelines.fingerprints import flatten
from irg_jax.config import TrainConfig
from irg_jax.parallel.hosts import Hosts, Place, meet, start_jax

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@contextlib.contextmanager
def start(stages: Sequence[TrainConfig], place: Place | None, *, timeout: int) -> Iterator[Hosts]:
    """All hosts of a run, JAX ready among them. Args: place is None for a process that is alone.

    Raises: ValueError if a host does not come within `timeout` seconds, or is about to run something else.
    """
    if place is None:
        _refuse_forgotten_hosts()
        yield Hosts()
        return
    hosts = meet(place, timeout)
    with contextlib.closing(hosts):
        hosts.agree(describe_code() | describe_config(stages))
        start_jax(place, timeout)
        yield hosts


def _refuse_forgotten_hosts() -> None:
    if (count := jax.process_count()) > 1:   # libtpu knows the whole slice, whatever we were told
        raise ValueError(f"this is one of {count} hosts of a slice; start the same command on each of them, "
                         "with --distributed")


def describe_code() -> dict[str, str]:
    """Of this host: a digest of the sources, and versions."""
    digest = hashlib.sha256()
    for folder in ("irg_jax", "data_pipelines"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    facts = {"code": digest.hexdigest()[:16], "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[f"package {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[f"package {name}"] = "absent"
    return facts


def describe_config(stages: Sequence[TrainConfig]) -> dict[str, str]:
    """Every field, so that one that differs can be told."""
    where = {f"config.stages.{stage.stage}" if len(stages) > 1 else "config": stage for stage in stages}
    return {f"{prefix}.{name}": repr(value) for prefix, stage in where.items()
            for name, value in flatten(dataclasses.asdict(stage)).items()}
