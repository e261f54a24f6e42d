"""The loop: restore, then fetch, step, log, save, until the last step or a signal.

A stage folder RUN/<stage> holds `model.json`, `tokenizer.json` and `vae.safetensors` (what does not train),
`checkpoints/`, `metrics.jsonl`, `tensorboard/` and `config.json`.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.batch import PackedBatch, Rows
from data_pipelines.faults import Fault
from data_pipelines.fingerprints import digest_values
from data_pipelines.pipeline import make_iterator
from irg_jax.checkpoints.bundle import FOLDER as BUNDLES
from irg_jax.checkpoints.bundle import Bundles, latest_step
from irg_jax.checkpoints.model import Model, save_stage_frozen
from irg_jax.checkpoints.placement import load_frozen, load_onto, put
from irg_jax.checkpoints.seals import set_bad_aside
from irg_jax.config import TrainConfig, check_model
from irg_jax.kernels.attention import TILE
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.hosts import Hosts
from irg_jax.parallel.sharding import BATCH_AXES, make_mesh, param_shardings, replicated
from irg_jax.training.metrics import MetricWriter, Progress
from irg_jax.training.moments import check_moments
from irg_jax.training.optimizer import make_optimizer
from irg_jax.training.step import TrainState, create_state, make_step


class Interrupt:
    """Whether SIGTERM or SIGINT came, to this host or another: the loop then saves and ends.

    Among several hosts, SIGTERM is left to JAX's coordination service, which tells them all and chooses a step
    that none of them has passed.
    """

    def __init__(self, hosts: Hosts):
        self._several, self._set = hosts.count > 1, False

    def reached(self, step: int) -> bool:
        """To be asked before every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._set

    @contextlib.contextmanager
    def listen(self) -> Iterator["Interrupt"]:
        def handler(number, frame):
            if self._several:
                signal.raise_signal(signal.SIGTERM)
            self._set = True
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield self
        finally:
            for number, old in before.items():
                signal.signal(number, old)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of everything the step touches."""

    state: TrainState
    vae: Any
    batch: Any
    scalar: Any


def find_source(config: TrainConfig, workdir: pathlib.Path) -> str | pathlib.Path:
    """The weights a new stage starts from: a checkpoint, or the EMA of another stage of this workdir."""
    source, separator, weights = config.init_from.partition(":")
    if not separator:
        return source
    if weights != "ema" or "/" in source:
        raise ValueError(f"init_from is {config.init_from!r}; use a checkpoint's folder or '<stage>:ema'")
    check_finished(workdir / source)
    return workdir / source


def check_finished(folder: pathlib.Path) -> None:
    """Raises ValueError if a stage was stopped before its last step: the next would start from less."""
    try:
        wanted = json.loads((folder / "config.json").read_text())["total_steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no trained stage ({error})") from error
    reached = latest_step(folder)
    if reached < wanted:
        raise ValueError(f"{folder} stopped at step {reached} of {wanted}; finish that stage first")


def place(model: Functional, vae: Functional, optimizer, mesh) -> Placement:
    """Parameters, moments and EMA share one layout; counters are replicated."""
    params = param_shardings(model.axes, model.shapes, mesh)
    scalar = replicated(mesh)
    opt = shard_moments(jax.eval_shape(optimizer.init, model.shapes), params, scalar)
    return Placement(TrainState(scalar, params, opt, params),
                     param_shardings(vae.axes, vae.shapes, mesh), place_batch(mesh), scalar)


def place_batch(mesh: jax.sharding.Mesh) -> PackedBatch:
    """Packs are dealt over the batch axes and the tokens of each stream over `context`; tables are whole."""
    spec = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    packs, tokens = spec(BATCH_AXES), spec(BATCH_AXES, "context")
    of = lambda name: (packs if name.startswith("image_") else
                       Rows(*[tokens] * len(Rows._fields)) if name.endswith("_rows") else tokens)
    return PackedBatch(*map(of, PackedBatch._fields))


def check_share(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if packs cannot be dealt evenly over the batch axes, or tokens over `context`."""
    packs, ways = config.data.packs_per_step // config.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if packs % ways:
        raise ValueError(f"data.packs_per_step / accumulate is {packs}; it must be a multiple of mesh.data * "
                         f"mesh.fsdp = {ways}. Change either, or move devices to mesh.context or mesh.tensor")
    for name in ("text_tokens", "vit_tokens", "latent_tokens"):
        size, ways = getattr(config.data, name), mesh.shape["context"]
        if size % ways:
            raise ValueError(f"data.{name} is {size}; it must be a multiple of mesh.context = {ways}. Change "
                             f"either; multiples of {TILE} x mesh.context waste no tile of attention")


def shard_moments(opt: optax.OptState, params: Any, scalar: Any) -> Any:
    """Every leaf of an optimiser state that stands at a parameter's path lies as that parameter does.

    By path, since `optax.tree_map_params` cannot see through the masks that frozen parameters leave.
    """
    keys = lambda path: tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    table = {keys(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}
    def find(path, leaf):
        names = keys(path)   # an optimiser may put keys of its own before a parameter's
        return next((table[names[i:]] for i in range(len(names)) if names[i:] in table), scalar)
    return jax.tree_util.tree_map_with_path(find, opt)


def rows_here(packs: NamedSharding, count: int) -> list[int]:
    """The packs of a step, of `count`, that this process's devices hold; others may hold them too."""
    held = packs.addressable_devices_indices_map((count,)).values()
    return sorted({row for (part,) in held for row in range(count)[part]})


class Trainer:
    """One stage: what is compiled, what is carried, where it is written.

    Made by every host by itself, which can fail on one; from `load` on all act together.
    """

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, hosts: Hosts):
        self.config, self.folder, self.hosts = config, workdir / config.stage, hosts
        self.start = latest_step(self.folder)
        self._origin = self.folder if self.start else find_source(config, workdir)
        self._source = source = load_frozen(self._origin)
        check_model(config.data, source.config)
        check_moments(config.data, source)
        if source.tokenizer is None:
            raise ValueError(f"{config.init_from} has no tokenizer.json; training needs one")
        self.model = Functional(lambda rngs: IRG(source.config, rngs=rngs))
        self.vae = Functional(lambda rngs: make_autoencoder(source.config, rngs=rngs))
        self.mesh = make_mesh(config.mesh)
        check_share(config, self.mesh)
        self.optimizer = make_optimizer(config.optimizer, config.total_steps, self.model.shapes)
        self.placement = place(self.model, self.vae, self.optimizer, self.mesh)
        self.rows = rows_here(self.placement.batch.image_height, config.data.packs_per_step)
        self.data = make_iterator(config.data, source.tokenizer, start=self.start, rows=self.rows,
                                  keep_journal=hosts.is_first)

    def facts(self) -> dict[str, str]:
        """What must be the same on every host before they go on together."""
        return {"workdir": str(self.folder.absolute()), "checkpoint step": str(self.start),
                "data": digest_values(self.data.packs.fingerprint), "devices": name_devices()}

    def load(self) -> None:
        """Places parameters and state; all hosts do this together."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.data.close)
            self.vae_params = jax.tree.map(put, self._source.vae, self.placement.vae)
            params = None if self.start else load_onto(self._origin, self.placement.state.params)
            # Opened once nothing more is to be refused: Orbax makes a folder, and has threads.
            self.bundles = Bundles(self.folder, keep=self.config.keep)
            undo.callback(self.bundles.close)
            self.state = self._restore() if self.start else self._create(params)
            undo.pop_all()
        self.step = jax.jit(make_step(self.model, self.vae, self.config.step_config()), donate_argnums=0,
                            out_shardings=(self.placement.state, self.placement.scalar))

    def _create(self, params: Params) -> TrainState:
        if self.hosts.is_first:
            save_stage_frozen(self.folder, self._source)
        create = jax.jit(lambda params: create_state(params, self.optimizer),
                         out_shardings=self.placement.state)
        return create(params)

    def _restore(self) -> TrainState:
        shapes = jax.eval_shape(lambda params: create_state(params, self.optimizer), self.model.shapes)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                                self.placement.state)
        items = self.bundles.restore(self.start, state=as_item(abstract), ema=abstract.ema)
        self.data.check_position(items["position"])
        return TrainState(**items["state"], ema=items["ema"])

    def save(self, step: int) -> None:
        self.bundles.save(step, state=as_item(self.state), ema=self.state.ema,
                          position=self.data.position(step))

    def next_batch(self) -> PackedBatch:
        """This process's packs of the next step. Host 0 counts what is bad on any of them, and names it.

        Raises: ValueError if it is more than is allowed.
        """
        batch = next(self.data)
        for fault in self.data.faults:
            self.hosts.note(fault)
        for fault in self.hosts.notes():
            self.data.packs.bad.add(Fault(*fault))
        return batch

    def put(self, batch: PackedBatch) -> PackedBatch:
        """This process's packs -> global arrays."""
        places = {row: place for place, row in enumerate(self.rows)}
        packs = self.config.data.packs_per_step

        def put(sharding: NamedSharding, local: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                rows = range(packs)[index[0]]   # neighbours, and so they are in `local`
                return local[places[rows[0]]:places[rows[-1]] + 1, *index[1:]]
            return jax.make_array_from_callback((packs, *local.shape[1:]), sharding, part)
        return jax.tree.map(put, self.placement.batch, batch)


def name_devices() -> str:
    """This host's, e.g. "4 x TPU v5p"."""
    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def as_item(state: TrainState) -> dict[str, Any]:
    """The state as a dict for Orbax; the EMA is an item of its own, so that it can be read alone."""
    return {"step": state.step, "params": state.params, "opt": state.opt}


def train(config: TrainConfig, workdir: pathlib.Path, hosts: Hosts | None = None) -> int:
    """Runs a stage to its last step, or to a signal; returns the step reached.

    Args: hosts are all processes of the run; the first of them writes logs and prints.
    Raises: ValueError for anything wrong with config, data or checkpoints, before the first step;
    FloatingPointError if loss or gradient is not finite in `max_skipped` steps in a row.
    """
    hosts = hosts or Hosts()
    with hosts.together():
        for sentence in set_bad_aside(workdir / config.stage / BUNDLES) if hosts.is_first else ():
            logging.error("%s", sentence)
    with hosts.together() as facts:
        trainer = Trainer(config, workdir, hosts)
        facts |= trainer.facts()
    with (Interrupt(hosts).listen() as interrupt, hosts.watching(), contextlib.closing(trainer.data),
          jax.set_mesh(trainer.mesh)):
        if trainer.start >= config.total_steps:
            tell(hosts, f"{trainer.folder}: already at step {trainer.start} of {config.total_steps}")
            return trainer.start
        trainer.load()
        step = fit(trainer, interrupt)
    if step < config.total_steps:
        tell(hosts, f"{trainer.folder}: stopped and saved at step {step}; the same command resumes")
    return step


def fit(trainer: Trainer, interrupt: Interrupt) -> int:
    """Steps, and the last checkpoint; the first of the hosts keeps the log."""
    with contextlib.ExitStack() as closing:
        closing.callback(trainer.bundles.close)
        writer = None
        if trainer.hosts.is_first:
            config = json.dumps(dataclasses.asdict(trainer.config), indent=1)
            (trainer.folder / "config.json").write_text(config)
            writer = closing.enter_context(
                contextlib.closing(MetricWriter(trainer.folder, first_step=trainer.start)))
        step = run_steps(trainer, writer, interrupt)
        trainer.save(step)
    return step


def tell(hosts: Hosts, sentence: str) -> None:
    """Prints what concerns all hosts once."""
    if hosts.is_first:
        print(sentence, flush=True)


def run_steps(trainer: Trainer, writer: MetricWriter | None, interrupt: Interrupt) -> int:
    """The loop itself. Metrics of a step are read after the next one is dispatched, so that reading
    them never stalls the device; saving comes after the step whose data it counts."""
    config, pending = trainer.config, None
    bar = tqdm.tqdm(total=config.total_steps, initial=trainer.start, desc=config.stage, unit="step",
                    mininterval=1.0, disable=writer is None)
    progress = Progress(bar, writer, log_every=config.log_every, max_skipped=config.max_skipped,
                        records=trainer.data.records)
    step = trainer.start
    while step < config.total_steps and not interrupt.reached(step):
        asked = time.perf_counter()
        batch = trainer.next_batch()
        waited = time.perf_counter() - asked
        trainer.state, metrics = trainer.step(trainer.state, trainer.vae_params, trainer.put(batch))
        if pending is not None:
            progress.tell(*pending)
        data = trainer.data.counters | {"data_wait_seconds": waited}
        data |= {f"fill_{stream}": share for stream, share in trainer.data.fill(step).items()}
        pending = (step, metrics, data)
        step += 1
        if step % config.save_every == 0:
            trainer.save(step)
    if pending is not None:
        progress.tell(*pending)
    bar.close()
    return step
