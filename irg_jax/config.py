"""What a training run is made of: frozen dataclasses, filled once from a ConfigDict at the door."""

import dataclasses
import importlib.util
from typing import Any

from data_pipelines.config import DataConfig
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import IRG
from irg_jax.models.lora import LoraConfig, adapt
from irg_jax.models.stack import REMAT
from irg_jax.parallel.sharding import MeshConfig
from irg_jax.parallel.topologies import Topology, find_topology
from irg_jax.training.losses import LossConfig
from irg_jax.training.optimizer import OptimizerConfig, never_trained
from irg_jax.training.step import StepConfig

# What BAGEL-7B-MoT was released with; a checkpoint brings its own.
BAGEL_7B_MOT = ModelConfig(
    LLMConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
              num_attention_heads=28, num_key_value_heads=4),
    ViTConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16),
    VAEConfig())


@dataclasses.dataclass(frozen=True)
class SliceConfig:
    """How a run is laid out on one TPU slice; see `python -m irg_jax.precompile`."""

    name: str                        # of the slice, e.g. "v5p-128"
    mesh: MeshConfig
    packs_per_step: int              # of the global batch: another one is another experiment
    accumulate: int = 1

    def __post_init__(self):
        find_topology(self.name)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What changes at a step of a stage, until the next phase; a field that is None stays as the stage has it.

    Moments of parameters that freeze are dropped, those of parameters that begin to train are zeros.
    """

    name: str
    from_step: int
    frozen: tuple[str, ...] | None = None    # as `optimizer.frozen`
    ce_weight: float | None = None           # 0: the text loss is off
    mse_weight: float | None = None          # 0: the image loss is off


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One stage of training. `python -m irg_jax.train --config FILE` fills it from `get_config()`."""

    stage: str                       # folder of this stage below --workdir
    init_from: str                   # a model checkpoint, or "<stage>:ema" of the same workdir
    total_steps: int
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    frozen_dtype: str = "float32"    # in which what never trains is held: "float32" or "bfloat16"
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    on_host: tuple[str, ...] = ()    # what lies in the host's memory: "moments", "ema"
    topologies: tuple[SliceConfig, ...] = ()  # in a config also {name: {mesh, packs_per_step}}
    seed: int = 42                   # noise of the flow and of the posterior
    accumulate: int = 1              # parts that a step's packs are taken in
    dtype: str = "bfloat16"          # of matmuls: "bfloat16" or "float32"
    remat: str = "full"              # what the backward pass computes again: "full", "attention", "none"
    save_every: int = 1000           # steps between checkpoints; the last step is always saved
    keep: int = 2                    # checkpoints kept
    log_every: int = 1               # steps between lines of metrics.jsonl
    max_skipped: int = 3             # steps in a row whose loss or gradient is not finite; they change nothing
    phases: tuple[Phase, ...] = ()   # in order; in a config also {name: {from_step, ...}}
    hang_seconds: int = 3600         # without progress, after which a run ends with its stacks; 0: never
    peak_tflops: float = 0.0         # of a device, for MFU; 0: as the table of known chips has it
    profile_at: int = 0              # step whose trace goes to STAGE/profile; 0: none
    profile_steps: int = 3           # steps that are traced
    wandb: str = ""                  # "offline" or "online": Weights & Biases too, if it is installed
    draw_every: int = 0              # steps between drawings of `samples`; their last is at the end
    samples: dict[str, Any] = dataclasses.field(default_factory=dict)    # a `SampleConfig`
    export: str = ""                 # format in which the end of the stage is exported to STAGE/export, or none

    def __post_init__(self):
        if not self.stage or "/" in self.stage or self.stage in (".", ".."):
            raise ValueError(f"stage is {self.stage!r}; it names one folder below the workdir")
        for name in ("dtype", "frozen_dtype"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; use 'bfloat16' or 'float32'")
        if unknown := set(self.on_host) - {"moments", "ema"}:
            raise ValueError(f"on_host has {', '.join(map(repr, sorted(unknown)))}; use 'moments', 'ema'")
        if self.on_host and (self.optimizer.moments != "float32" or self.lora.groups):
            raise ValueError(f"on_host is {self.on_host}, optimizer.moments {self.optimizer.moments!r} and "
                             f"lora.groups {self.lora.groups}; it goes with moments of float32 and without "
                             "LoRA, whose moments are small")
        if self.wandb not in ("", "offline", "online"):
            raise ValueError(f"wandb is {self.wandb!r}; use 'offline', 'online' or nothing")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb is asked for and not installed: pip install wandb, or leave it out")
        if self.export not in ("", "bagel", "orbax"):
            raise ValueError(f"export is {self.export!r}; use 'bagel', 'orbax' or nothing")
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}; use one of {', '.join(REMAT)}")
        for name in ("total_steps", "save_every", "keep", "log_every", "accumulate", "max_skipped",
                     "profile_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        starts = [phase.from_step for phase in self.phases]
        if starts != sorted(set(starts)) or (starts and not 0 < starts[0] <= starts[-1] < self.total_steps):
            raise ValueError(f"phases begin at steps {starts}; they must rise, between 1 and total_steps - 1 = "
                             f"{self.total_steps - 1}")
        for name in ("hang_seconds", "peak_tflops", "profile_at", "draw_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.data.packs_per_step % self.accumulate:
            raise ValueError(f"data.packs_per_step {self.data.packs_per_step} does not divide into "
                             f"accumulate = {self.accumulate} parts")

    def on(self, topology: Topology) -> "TrainConfig":
        """The same run as the table lays it out on a slice; as it stands if the table has no such slice."""
        for each in self.topologies:
            if find_topology(each.name) == topology:
                data = dataclasses.replace(self.data, packs_per_step=each.packs_per_step)
                return dataclasses.replace(self, mesh=each.mesh, data=data, accumulate=each.accumulate)
        return self

    def at(self, step: int) -> "TrainConfig":
        """The stage as the phase of a step has it."""
        config = self
        for phase in self.phases:
            if phase.from_step <= step:
                weights = {name: value for name in ("ce_weight", "mse_weight")
                           if (value := getattr(phase, name)) is not None}
                optimizer = self.optimizer if phase.frozen is None else dataclasses.replace(
                    self.optimizer, frozen=phase.frozen)
                loss = dataclasses.replace(self.loss, **weights)
                config = dataclasses.replace(self, optimizer=optimizer, loss=loss)
        return config

    def network(self, model: ModelConfig) -> Functional:
        """The network that is trained: with adapters, where the config asks for some."""
        return Functional(lambda rngs: adapt(IRG(model, rngs=rngs), self.lora, rngs=rngs))

    def never_trained(self, shapes: Params) -> tuple[str, ...]:
        """Dotted paths of the parameters that train in no phase; each phase's names are looked at.

        Raises: ValueError if a phase trains nothing, or freezes what is no group and no parameter's prefix.
        """
        phases = {self.at(step).optimizer.frozen for step in (0, *(phase.from_step for phase in self.phases))}
        return never_trained(shapes, phases)

    def step_config(self) -> StepConfig:
        groups = tuple(group.name for group in self.data.groups)
        return StepConfig(self.loss, self.optimizer, self.total_steps, self.seed, self.data.canvas,
                          self.accumulate, self.dtype, self.remat, groups)


def check_model(data: DataConfig, model: ModelConfig) -> None:
    """Raises ValueError, with every disagreement, if the batches do not fit the network."""
    pairs = [("data.latent_patch", data.latent_patch, "pixels a latent token", model.pixels_per_token),
             ("data.vit_patch", data.vit_patch, "vit_config.json patch_size", model.vit.patch_size),
             ("data.max_latent_size", data.max_latent_size, "config.json max_latent_size",
              model.max_latent_size),
             ("data.vit_max_side", data.vit_max_side, "config.json vit_max_num_patch_per_side",
              model.vit_max_num_patch_per_side)]
    faults = [f"{name} is {value}, the checkpoint's {other} is {wanted}"
              for name, value, other, wanted in pairs if value != wanted]
    if faults:
        raise ValueError("config and checkpoint disagree: " + "; ".join(faults))
