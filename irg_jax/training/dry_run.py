"""What a run would be, without a device: its config, mesh, memory, packs, epochs and hours."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.costs import CostTable
from data_pipelines.fingerprints import flatten
from data_pipelines.packing import empty_pack
from data_pipelines.pipeline import Packs
from data_pipelines.planning import Planner
from data_pipelines.simulation import RECORDS, simulate
from data_pipelines.tokenizer import Tokenizer
from irg_jax.checkpoints.model import DESCRIPTION, load_description, load_tokenizer
from irg_jax.config import BAGEL_7B_MOT, TrainConfig, check_model
from irg_jax.models.config import ModelConfig
from irg_jax.parallel.compiling import GIB, device_bytes
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.sharding import make_abstract_mesh
from irg_jax.parallel.topologies import Topology
from irg_jax.training.abstract import lay_out, trace_encoder
from irg_jax.training.goodput import read_lines
from irg_jax.training.metrics import LOG
from irg_jax.training.optimizer import select
from irg_jax.training.placement import check_share
from irg_jax.training.planned import Planned, count_passes, model_flops, plan_packs

_PLANNED = 64   # packs that are planned, and of whose work and records the mean is taken


class Origin(NamedTuple):
    """What is trained, and on what; `notes` say what had to be assumed."""

    model: ModelConfig
    tables: dict[str, CostTable]
    notes: tuple[str, ...]


def describe(config: TrainConfig, workdir: pathlib.Path | None, *, topology: Topology | None = None,
             devices: int = 1, mfu: float = 0.4, earlier: Sequence[TrainConfig] = ()) -> str:
    """The page that `irg_jax.train --dry_run` prints.

    Args:
        workdir: of the run, whose steps may have been measured already.
        topology: slice of TPUs; without one the mesh has so many `devices`.
        mfu: share of the chips' peak that useful operations are taken to reach.
        earlier: stages of the same job, from which this one may start.
    Raises: ValueError as a run would for its config, and for data or a checkpoint that are there but damaged.
    """
    mesh = (make_abstract_mesh(config.mesh, topology.num_chips, topology.slices) if topology
            else make_abstract_mesh(config.mesh, devices))
    check_share(config, mesh)
    origin = find_origin(config, workdir, earlier)
    planned = plan_packs(config.data, tables=origin.tables, packs=_PLANNED)
    where = f"{topology.num_chips} chips of {topology.cloud_name}" if topology else f"{devices} devices"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join([
        *(f"config.{name} = {value!r}" for name, value in flatten(dataclasses.asdict(config)).items()),
        "", *origin.notes, f"mesh: {axes} on {where}",
        *describe_memory(config, origin.model, mesh, topology),
        *describe_packs(config, mesh, planned, origin.tables),
        *describe_time(config, origin.model, planned, workdir, topology, mfu)])


def find_origin(config: TrainConfig, workdir: pathlib.Path | None, earlier: Sequence[TrainConfig]) -> Origin:
    """The geometry of the checkpoint and the costs of the records, or of BAGEL-7B-MoT and simulated ones."""
    folder, notes = find_folder(config, workdir, earlier), list[str]()
    model, tokenizer = BAGEL_7B_MOT, None
    if folder:
        model = load_description(folder)[0]
        tokenizer = load_tokenizer(folder, model)
        check_model(config.data, model)
    else:
        check_assumed(config)
        notes.append(f"model: {config.init_from} is no checkpoint yet; BAGEL-7B-MoT is assumed")
    tables = read_tables(config, tokenizer)
    if tables is None:
        notes.append(f"data: {config.data.source} is not here" + ("" if tokenizer else ", or no tokenizer")
                     + f"; {RECORDS:,} records of each mode are simulated (data_pipelines/simulation.py)")
        tables = simulate(config.data)
    return Origin(model, tables, tuple(notes))


def check_assumed(config: TrainConfig) -> None:
    """Raises: ValueError if the config does not suit BAGEL-7B-MoT, which is taken for what is not there."""
    try:
        check_model(config.data, BAGEL_7B_MOT)
    except ValueError as error:
        raise ValueError(f"init_from {config.init_from} is no checkpoint yet, and BAGEL-7B-MoT, taken for it, "
                         f"does not suit the config: {error}") from error


def find_folder(config: TrainConfig, workdir: pathlib.Path | None,
                earlier: Sequence[TrainConfig]) -> pathlib.Path | None:
    """Where the geometry of a stage is told: its own folder, what it starts from, or what that starts from."""
    source, separator, _ = config.init_from.partition(":")
    first = workdir / source if separator and workdir else pathlib.Path(source)
    for folder in [first] if workdir is None else [workdir / config.stage, first]:
        if (folder / DESCRIPTION).is_file():
            return folder
    before = [number for number, stage in enumerate(earlier) if separator and stage.stage == source]
    return find_folder(earlier[before[0]], workdir, earlier[:before[0]]) if before else None


def read_tables(config: TrainConfig, tokenizer: Tokenizer | None) -> dict[str, CostTable] | None:
    """The costs of the records, if they are here."""
    if tokenizer is None or not pathlib.Path(config.data.source).exists():
        return None
    return Packs(dataclasses.replace(config.data, moments=""), tokenizer, keep_journal=False).tables


def describe_memory(config: TrainConfig, model: ModelConfig, mesh: jax.sharding.AbstractMesh,
                    topology: Topology | None) -> Iterator[str]:
    """What lies on one device, before the compiler has its say."""
    *_, state, vae_params = lay_out(config, model, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    packs = config.data.packs_per_step // shards
    parts = {"parameters": device_bytes(state.params), "moments": device_bytes(state.opt),
             "EMA": device_bytes(state.ema),
             "gradients": device_bytes(select(state.params, config.optimizer.frozen)),
             "encoder": device_bytes(vae_params),
             "batch": packs * sum(leaf.nbytes for leaf in jax.tree.leaves(empty_pack(config.data))),
             "layers' inputs": saved_inputs(config, model, mesh)}
    total = sum(parts.values())
    params = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    have = f" of {topology.chip.hbm_gib} GiB" if topology else ""
    yield f"parameters: {params / 1e9:,.3f} B"
    yield f"memory of a device: at least {total / GIB:,.2f} GiB{have}: " + ", ".join(
        f"{name} {size / GIB:,.2f}" for name, size in parts.items())
    if held := device_bytes(state, on_host=True):
        yield f"    in the host's memory for each: {held / GIB:,.2f} GiB ({', '.join(config.on_host)})"
    if topology:
        yield (f"    what the compiler adds: python -m irg_jax.precompile --topology {topology.cloud_name} "
               "--config ...")
        if total > topology.chip.hbm_gib * GIB:
            yield "    this does not fit: take a larger slice, or split more (mesh.fsdp, mesh.context)"


def saved_inputs(config: TrainConfig, model: ModelConfig, mesh: jax.sharding.AbstractMesh) -> int:
    """Bytes that the forward pass keeps for the backward pass, whatever is computed again: inputs of layers."""
    data, width = config.data, jax.numpy.dtype(config.dtype).itemsize
    packs = data.packs_per_step // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    slots = data.text_tokens + data.vit_tokens + data.latent_tokens
    values = (slots * model.llm.hidden_size * model.llm.num_hidden_layers
              + data.vit_tokens * model.vit.hidden_size * model.num_vit_layers)
    return packs * values * width // mesh.shape["context"]


def describe_packs(config: TrainConfig, mesh: jax.sharding.AbstractMesh, planned: Planned,
                   tables: Mapping[str, CostTable]) -> Iterator[str]:
    """Packs and tokens of a step, and how long an epoch of each group is."""
    data, shards = config.data, mesh.shape["data"] * mesh.shape["fsdp"]
    slots = data.text_tokens + data.vit_tokens + data.latent_tokens
    used = planned.text + planned.vit + planned.latent
    yield (f"a step: {data.packs_per_step} packs, {data.packs_per_step // shards} on each of {shards} shards "
           f"of the batch, in {config.accumulate} parts; {data.packs_per_step * slots:,} slots, "
           f"{data.packs_per_step * used:,.0f} tokens ({used / slots:.1%})")
    planner = Planner(data, tables)
    groups = [entry.group for index in range(_PLANNED) for entry in planner[index].entries]
    for name, table in tables.items():
        taken = groups.count(name) / _PLANNED * data.packs_per_step
        usable = len(table) - len(table.oversize)
        epoch = f"{usable / taken:,.0f} steps an epoch, {config.total_steps * taken / usable:.2f} epochs" \
            if taken else "none drawn"
        yield f"    {name}: {usable:,} records, {taken:.1f} a step, {epoch}"


def describe_time(config: TrainConfig, model: ModelConfig, planned: Planned, workdir: pathlib.Path | None,
                  topology: Topology | None, mfu: float) -> Iterator[str]:
    """Hours, from steps that were measured in this workdir, else from the chips' peak."""
    data = config.data
    image = count_flops(trace_encoder(config, model).jaxpr).total * planned.latent / data.canvas**2
    work = data.packs_per_step * model_flops(planned, model, image, count_passes(config))
    yield f"work: {operations(work)} a step, {operations(work * config.total_steps)} for the stage"
    steps = f"{config.total_steps:,} steps"
    if measured := measured_seconds(workdir / config.stage if workdir else None):
        yield (f"time: {hours(measured * config.total_steps)} for {steps} of {measured:.2f} s, as measured in "
               f"{workdir / config.stage}")
    elif topology:
        seconds = work / (topology.num_chips * topology.chip.flops * mfu)
        yield (f"time: {hours(seconds * config.total_steps)} for {steps} of {seconds:.2f} s, if {mfu:.0%} of "
               f"the chips' peak of {topology.chip.flops / 1e12:.0f} TFLOP/s is reached (--mfu; an assumption)")
    else:
        yield (f"time: unknown without --topology or steps already run; 1 hour at "
               f"{operations(work * config.total_steps / 3600)} a second, all devices together")


def measured_seconds(folder: pathlib.Path | None) -> float | None:
    """The median of the last steps of a run, if there was one."""
    lines = read_lines(folder / LOG)[-100:] if folder else []
    return float(np.median([line["step_seconds"] for line in lines])) if len(lines) > 2 else None


def operations(count: float) -> str:
    """With the prefix that leaves one to three digits before the point."""
    power = max(0, min(6, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:,.4g} {' kMGTPE'[power].strip()}FLOP"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.0f} minutes"
