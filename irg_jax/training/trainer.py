"""One stage of training: what is compiled, what is carried, where it is written.

A stage folder RUN/<stage> holds `model.json`, `tokenizer.json` and `vae.safetensors` (what does not train),
`checkpoints/`, `config.json`, the logs (see `metrics`), `goodput.json` and `samples/`.
"""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from PIL import Image

from data_pipelines.batch import PackedBatch
from data_pipelines.faults import Fault
from data_pipelines.fingerprints import digest_values
from data_pipelines.pipeline import make_iterator
from irg_jax.checkpoints.bundle import Bundles, check_sound, latest_step
from irg_jax.checkpoints.model import Model, read_json, save_stage_frozen
from irg_jax.checkpoints.placement import load_frozen, load_onto, put
from irg_jax.config import TrainConfig, check_model
from irg_jax.models.functional import Functional, Params
from irg_jax.models.groups import keep, paths_of, pick, replace
from irg_jax.models.irg import make_autoencoder
from irg_jax.models.lora import is_adapter, merge
from irg_jax.parallel.compiling import abstract
from irg_jax.parallel.hosts import Hosts
from irg_jax.parallel.sharding import local_mesh, make_mesh, param_shardings
from irg_jax.training.abstract import hold
from irg_jax.training.goodput import Ledger
from irg_jax.training.metrics import LOG, EventLog
from irg_jax.training.moments import check_moments
from irg_jax.training.optimizer import OptimizerConfig, make_optimizer
from irg_jax.training.placement import bring_home, check_host_memory, check_share, place, rows_here
from irg_jax.training.profiling import seconds_at_peak
from irg_jax.training.resuming import CONFIG, check_changes
from irg_jax.training.state import TrainState, create_state
from irg_jax.training.step import make_step


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
        wanted = read_json(folder / CONFIG).get("total_steps")
        if type(wanted) is not int:
            raise ValueError(f"{folder / CONFIG}: total_steps is {wanted!r}; it must be an integer")
    except ValueError as error:
        raise ValueError(f"{folder} holds no trained stage ({error})") from error
    reached = latest_step(folder)
    if reached < wanted:
        raise ValueError(f"{folder} stopped at step {reached} of {wanted}; finish that stage first")


class Trainer:
    """One stage: what is compiled, what is carried, where it is written.

    Made by every host by itself, which can fail on one; from `load` on all act together.
    """

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, hosts: Hosts,
                 accepted: Collection[str] = ()):
        """Args: accepted are the names of config fields that may have changed since the stage was begun."""
        self.config, self.folder, self.hosts = config, workdir / config.stage, hosts
        self.events, self._told = EventLog(None), set[Fault]()
        self.ledger = Ledger(self.folder / "goodput.json" if hosts.is_first else None)
        self.start = latest_step(self.folder)
        self.changes = check_changes(self.folder, config, self.start, accepted) if self.start else []
        self._origin = self.folder if self.start else find_source(config, workdir)
        self.source = source = load_frozen(self._origin)
        check_model(config.data, source.config)
        check_moments(config.data, source)
        if source.tokenizer is None:
            raise ValueError(f"{config.init_from} has no tokenizer.json; training needs one")
        self.model = config.network(source.config)
        self.never = config.never_trained(self.model.shapes)    # a name that is none is refused now
        self.not_averaged = self.never    # what the EMA lacks
        self.vae = Functional(lambda rngs: make_autoencoder(source.config, rngs=rngs))
        self.mesh = make_mesh(config.mesh)
        check_share(config, self.mesh)
        check_host_memory(config.on_host)
        self._lay_out(config.at(self.start).optimizer)
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
            self.vae_params = jax.tree.map(put, self.source.vae, self.placement.vae)
            params = None if self.start else self._load()
            # Opened once nothing more is to be refused: Orbax makes a folder, and has threads.
            self.bundles = Bundles(self.folder, keep=self.config.keep)
            undo.callback(self.bundles.close)
            self.state = self._restore() if self.start else self._create(params)
            undo.pop_all()
        self.enter(self.start)

    def enter(self, step: int) -> None:
        """Prepares the phase of `step`: its program, and moments of what trains in it and of nothing else."""
        config = self.config.at(step)
        self._lay_out(config.optimizer)
        opt = carry_over(self.state, self._optimizer, self.placement.state.opt)
        self.state = dataclasses.replace(self.state, opt=opt)
        self._frozen, self._is_compiled = config.optimizer.frozen, False
        self._step = jax.jit(make_step(self.model, self.vae, config.step_config()), donate_argnums=0,
                             out_shardings=(self.placement.state, self.placement.scalar))

    def advance(self, batch: PackedBatch) -> dict[str, Any]:
        """Starts a step with this process's packs; returns its metrics, which are not waited for.

        Raises: SaveError if a save under way has failed: what comes after it could be lost.
        """
        self.bundles.check()
        batch = self.put(batch)
        with contextlib.nullcontext() if self._is_compiled else self.ledger.spend("compiling"):
            self.state, metrics = self._step(self.state, self.vae_params, batch)
        self._is_compiled = True
        return metrics

    def _lay_out(self, config: OptimizerConfig) -> None:
        self._optimizer = make_optimizer(config, self.config.total_steps)
        self.placement = place(self.model, self.vae, self._optimizer, self.mesh, self.not_averaged,
                               self.config.on_host)

    def _load(self) -> Params:
        """The weights that a stage starts from, and adapters that change nothing yet."""
        adapters = [is_adapter(path) for path in paths_of(self.model.shapes)]
        fresh = lambda tree: keep(tree, adapters)
        params = load_onto(self._origin, keep(self._held().params, [not each for each in adapters]),
                           check=self._check_for_all)
        if not any(adapters):
            return params
        init = jax.jit(lambda: fresh(self.model.init(self.config.seed)),
                       out_shardings=fresh(self.placement.state.params))
        return replace(params, init())

    def _check_for_all(self, step: pathlib.Path, *items: str) -> None:
        """`check_sound` by the first host alone: what all read may be hundreds of gigabytes."""
        if self.hosts.is_first:
            check_sound(step, *items)
        self.hosts.await_first()

    def _held(self) -> TrainState:
        """Shapes and shardings of the state."""
        params = hold(self.model.shapes, self.never, self.config.frozen_dtype)
        shapes = jax.eval_shape(lambda params: create_state(params, self._optimizer, self.not_averaged), params)
        return abstract(shapes, self.placement.state)

    def _create(self, params: Params) -> TrainState:
        if self.hosts.is_first:
            save_stage_frozen(self.folder, self.source)
        self.ledger.resume({}, self.folder / LOG, 0)
        create = jax.jit(lambda params: create_state(params, self._optimizer, self.not_averaged),
                         out_shardings=self.placement.state)
        return create(params)

    def _restore(self) -> TrainState:
        """The newest state, with the moments of what trained when it was saved."""
        position = self.bundles.position(self.start)
        self.data.check_position(position)
        self.ledger.resume(position["timer"], self.folder / LOG, self.start)
        self.not_averaged = tuple(position.get("not_averaged", ()))
        self._lay_out(dataclasses.replace(self.config.optimizer, frozen=tuple(position["frozen"])))
        held = self._held()
        items = self.bundles.restore(self.start, state=as_item(held), ema=held.ema)
        begins = [path in self.not_averaged and path not in self.never for path in paths_of(self.model.shapes)]
        self.not_averaged = tuple(path for path in self.not_averaged if path in self.never)
        begun = jax.tree.map(jnp.copy, keep(items["state"]["params"], begins))
        self._lay_out(self.config.optimizer)
        begun = jax.device_put(begun, pick(self.placement.state.ema, begun))
        return TrainState(**items["state"], ema=replace(items["ema"], begun))

    def save(self, step: int) -> None:
        """Raises: SaveError if this save or an earlier one failed, as on a full disk."""
        with self.ledger.spend("saving"):
            position = self.data.position(step) | {
                "timer": self.ledger.state(), "frozen": list(self._frozen),
                "not_averaged": list(self.not_averaged), "lora": dataclasses.asdict(self.config.lora)}
            self.bundles.save(step, state=as_item(self.state), ema=self.state.ema, position=position)
        self.ledger.write(now=True)

    def next_batch(self) -> PackedBatch:
        """This process's packs of the next step. Host 0 counts what is bad on any of them, and names it.

        Raises: ValueError if it is more than is allowed.
        """
        asked, step = time.perf_counter(), self.data.get_state()
        try:
            with self.ledger.spend("waiting for data"):
                return next(self.data)
        finally:
            self._waited = time.perf_counter() - asked
            self._tell_bad(step)

    def tell_planned(self) -> None:
        """Makes events of records that were bad when steps were planned; every host knows them by itself."""
        for fault in self.data.packs.bad.faults:
            self._told.add(fault)
            self.events.write("bad record", self.start, ": ".join(fault))

    def _tell_bad(self, step: int) -> None:
        """Events first: the record that is one too many raises, here or where it was read."""
        heard = [Fault(*fault) for fault in self.hosts.notes()]
        for fault in (*self.data.faults, *heard):
            if fault not in self._told:    # as in an epoch before, or by a host that shares the pack
                self._told.add(fault)
                self.events.write("bad record", step, ": ".join(fault))
                self.hosts.note(fault)
        for fault in heard:
            self.data.packs.bad.add(fault)

    def data_counters(self, step: int) -> dict[str, float]:
        """Of all data so far, and of the step's: wait for it, and used share of each stream."""
        fill = {f"fill_{stream}": share for stream, share in self.data.fill(step).items()}
        return self.data.counters | {"data_wait_seconds": self._waited} | fill

    def seconds_at_peak(self) -> float | None:
        """What a step would take at the devices' peak; told on the first host alone."""
        if not self.hosts.is_first:
            return None
        return seconds_at_peak(self.config, self.source.config, self.data.packs)

    def draw(self, draw: Callable[[Model, int], Image.Image], step: int) -> Image.Image | None:
        """Lets `draw` have the EMA as a model, on devices of the first host; on others nothing is drawn."""
        whole = merge(replace(self.state.params, self.state.ema), self.config.lora)
        mesh, picture = local_mesh(self.source.config.llm.num_key_value_heads), None
        there = param_shardings(pick(self.model.axes, whole), whole, mesh)
        with self.ledger.spend("drawing"):
            ema = bring_home(whole, there, self.config.dtype, stays=self.hosts.is_first)
            if self.hosts.is_first:
                with jax.set_mesh(mesh):
                    picture = draw(dataclasses.replace(self.source, params=ema), step)
            self.hosts.await_first()
        return picture

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


def carry_over(state: TrainState, optimizer: optax.GradientTransformation, shardings: Any) -> Any:
    """The state of an optimiser of other parameters, perhaps: what is known stays, the rest begins."""
    wanted = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, state.params))
    known = dict(jax.tree_util.tree_leaves_with_path(state.opt))
    missing = [place for place, (path, _) in enumerate(wanted) if path not in known]
    begin = lambda params: [leaf for place, leaf in enumerate(jax.tree.leaves(optimizer.init(params)))
                            if place in missing]
    places = jax.tree.leaves(shardings)
    begun = jax.jit(begin, out_shardings=[places[place] for place in missing])(state.params) if missing else []
    fresh = dict(zip(missing, begun, strict=True))
    leaves = [fresh[place] if place in fresh else known[path] for place, (path, _) in enumerate(wanted)]
    return jax.tree.unflatten(jax.tree.structure(shardings), leaves)


def name_devices() -> str:
    """This host's, e.g. "4 x TPU v5p"."""
    kinds = collections.Counter(device.device_kind for device in jax.local_devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def as_item(state: TrainState) -> dict[str, Any]:
    """The state as a dict for Orbax; the EMA is an item of its own, so that it can be read alone."""
    return {"step": state.step, "params": state.params, "opt": state.opt}
