"""What the parity tests share: the golden set, the model loaded from it, and measured errors."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from data_cases import FakeTokenizer, Golden
from data_pipelines.batch import PackedBatch, Rows
from data_pipelines.config import ImageTransform
from data_pipelines.packing import assemble
from irg_jax.checkpoints import names
from irg_jax.checkpoints.bagel import import_folder
from irg_jax.models.functional import Functional, Params
from irg_jax.models.irg import IRG, make_autoencoder, pack_latent
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.trajectory import Generator
from irg_jax.training.losses import Flow, LossConfig, make_flow
from irg_jax.training.optimizer import OptimizerConfig
from irg_jax.training.step import StepConfig

REPORT: dict[str, float] = {}  # module -> largest error measured in this session


def relative(name: str, actual, expected, tolerance: float) -> None:
    """Asserts norm(actual - expected) <= tolerance * norm(expected), and remembers the figure."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, the original has {expected.shape}"
    norm = np.linalg.norm(expected)
    error = float(np.linalg.norm(actual - expected) / norm if norm else np.linalg.norm(actual))
    REPORT[name] = max(REPORT.get(name, 0.0), error)
    assert error <= tolerance, f"{name}: relative error {error:.2e} is above {tolerance:.0e}"


class ParityCase:
    """A golden folder, and this project's model with its weights."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.golden = folder, Golden(folder)
        self.arrays, self.values = self.golden.arrays, self.golden.values
        self.model = import_folder(folder)
        self.config = self.model.config
        self.network = Functional(lambda rngs: IRG(self.config, rngs=rngs))
        self.autoencoder = Functional(lambda rngs: make_autoencoder(self.config, rngs=rngs))
        as_jax = lambda tree: jax.tree.map(jnp.asarray, tree)
        self.params, self.vae_params = as_jax(self.model.params), as_jax(self.model.vae)
        self.irg, self.vae = self.network.bind(self.params), self.autoencoder.bind(self.vae_params)

    def pack(self, **fields) -> PackedBatch:
        """The golden training samples as one batch of one pack, with room to spare in each stream."""
        config = self.golden.data_config(**self.golden.room(), **fields)
        pack = assemble(self.golden.train_samples(), config=config,
                        tokenizer=FakeTokenizer(self.values["special_tokens"]))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], pack)

    def flow(self, batch: PackedBatch) -> Flow:
        """The golden latents (posterior means), noise and timesteps."""
        count = sum(name.startswith("train.latent.") for name in self.arrays)
        images = [self.arrays[f"train.latent.{i}"].transpose(1, 2, 0)[None] for i in range(count)]
        tokens = [pack_latent(jnp.asarray(x), self.config.latent_patch_size)[0] for x in images]
        room = lambda x: jnp.pad(x, ((0, batch.latent_image.shape[1] - len(x)), (0, 0)))[None]
        return make_flow(batch, room(jnp.concatenate(tokens)), room(self.arrays["train.noise"]),
                         self.config.timestep_shift)

    def to_torch(self, tree: Params) -> dict[str, np.ndarray]:
        """Parameters or gradients under their torch names."""
        slots = names.model_slots(self.config)
        leaves = dict(names.unstack(names.flatten(tree), slots))
        return {slot.name: slot.to_torch(np.asarray(leaves[slot.leaf])) for slot in slots}

    def step_config(self, **fields) -> StepConfig:
        """The golden optimiser run."""
        values = self.values["optim"]
        optimizer = OptimizerConfig(
            learning_rate=values["lr"], warmup_steps=values["warmup_steps"], b1=values["b1"],
            b2=values["b2"], eps=values["eps"], weight_decay=values["weight_decay"],
            clip=values["clip"], ema_decay=values["ema_decay"])
        loss = LossConfig(timestep_shift=self.config.timestep_shift, posterior="mean")
        height = max(image.shape[1] for name, image in self.arrays.items() if "train.vae_image" in name)
        width = max(image.shape[2] for name, image in self.arrays.items() if "train.vae_image" in name)
        return StepConfig(**({"loss": loss, "optimizer": optimizer, "total_steps": 100, "seed": 0,
                              "canvas": max(height, width) // self.config.pixels_per_token} | fields))


def batched_rows(length: int, lengths: list[int]) -> Rows:
    """Rows of a ViT stream [1, length] that holds images of the given lengths, one sample."""
    order = np.arange(sum(lengths), dtype=np.int32)
    span = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths).astype(np.int32)
    last = np.repeat(np.cumsum(lengths) - 1, lengths).astype(np.int32)
    zero = np.zeros_like(order)
    return Rows(*(jnp.asarray(x)[None] for x in (order, zero, span, last, zero.astype(bool), zero)))


class NumberTokenizer:
    """Ids as text: "3 11 206"."""

    def __init__(self, special: dict[str, int]):
        self.bos, self.eos = special["bos_token_id"], special["eos_token_id"]
        self.start_of_image, self.end_of_image = special["start_of_image"], special["end_of_image"]

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def flow(values: dict) -> FlowConfig:
    return FlowConfig(**{**values, "cfg_interval": tuple(values["cfg_interval"])})


def transform(values: list[int]) -> ImageTransform:
    return ImageTransform(*values)


def numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def generator(case: ParityCase, noise: list[str], values: dict, **fields) -> Generator:
    """A generator, in float32 unless said, whose image of turn i starts from the golden array noise[i]."""
    config = SamplingConfig(
        vae_transform=transform(values["vae_transform"]), posterior="mean",
        vit_transform=transform(values["vit_transform"]), text_multiple=8, cache_multiple=32,
        **{"dtype": "float32", "height": values["height"], "width": values["width"], **fields})
    tokenizer = NumberTokenizer(case.values["special_tokens"])
    model = dataclasses.replace(case.model, tokenizer=tokenizer)
    draw_noise = lambda seeds, turn, shape: jnp.asarray(case.arrays[noise[turn]]).reshape(1, *shape)
    return Generator(model, config, draw_noise=draw_noise)


def trajectory_generator(case: ParityCase, **fields) -> Generator:
    """Generates as the golden two-turn trajectory did."""
    values = case.values["infer"]
    return generator(case, ["infer.noise1", "infer.noise2"], values,
                     system_prompt=numbers(values["system"]), turn1=flow(values["turn1"]),
                     turn2=flow(values["turn2"]),
                     text=TextConfig(max_length=values["max_length"], do_sample=False), **fields)


def thought(generator: Generator, state) -> list[int]:
    written = generator.write(state)
    return np.asarray(written.ids)[0, :int(written.lengths[0])].tolist()


def grey_levels(name: str, actual, expected) -> None:
    error = int(np.abs(actual.astype(int) - expected.astype(int)).max())
    REPORT[f"{name}, grey levels"] = error
    assert error <= 1, f"{name}: grey levels differ by up to {error}"


def first_turn(case: ParityCase, trajectory: Generator):
    """The state after the golden think1."""
    values = case.values["infer"]
    return trajectory.think(trajectory.begin([numbers(values["prompt"])], seeds=[0]),
                            [numbers(values["think1"])])[1]


def second_turn(case: ParityCase, trajectory: Generator):
    """The state that has looked at the golden image1."""
    return trajectory.look(first_turn(case, trajectory), [case.arrays["infer.image1_uint8"]])
