"""A two-turn trajectory: seconds a pair, milliseconds a token of text, useful TFLOP/s of drawing, and memory.

    python -m benchmarks.generate --size 7b             # one GPU of 80 GB or more, or a TPU with 32: minutes
    python -m benchmarks.generate --size shapes         # two CPU cores: minutes
    python -m benchmarks.generate --size 7b --layers 1 --side 64 --words 8 --num_timesteps 3   # a try on a CPU

`7b` is BAGEL-7B-MoT with random bf16 weights at IRG's published settings (1024 x 1024; 90 passes of the network
in turn 1 and 147 in turn 2), `shapes` the miniature at the settings of configs/shapes_generate.py. Both think
`--words` tokens a turn. The trajectory runs twice: the first time is that to the first result,
compilation included, the second is the steady one, part by part. Useful work of drawing is 2 operations a
parameter and latent token and 4 a channel of a visible pair, nothing else. The limit of drawing is the chip's
dense bf16 peak (of a device without a figure, the rate of one large matmul in the model's dtype), that of a
token the reading of its weights once, where the bandwidth is known. Prints one JSON object last and writes
benchmarks/results/generate_SIZE.json.
"""

import dataclasses
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import machine
from benchmarks.attention import matmul_tflops
from configs import shapes_generate
from data_pipelines import command
from data_pipelines.batch import INF
from data_pipelines.config import from_config_dict
from irg_jax.checkpoints.bagel import read_config
from irg_jax.config import BAGEL_7B_MOT
from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Functional, Params
from irg_jax.models.groups import paths_of
from irg_jax.parallel.topologies import CHIPS, peak_flops
from irg_jax.sampling import programs
from irg_jax.sampling.config import FlowConfig, SamplingConfig
from irg_jax.sampling.flow import timesteps
from irg_jax.sampling.trajectory import Generator, State

SYSTEM, PROMPT = 60, 40   # tokens
WORDS = {"7b": 300, "shapes": 60}
SIDE = 4096               # of the large matmul
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12} | {
    name: CHIPS[chip].hbm_bandwidth for name, chip in
    (("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"))}   # bytes a second


class Words:
    """A tokenizer of numbers; the end of a text is a token that greedy random weights never choose."""

    bos, eos, start_of_image, end_of_image = 1, 2, 3, 4

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


class RandomModel(NamedTuple):
    """Normal weights of a geometry, made on the device leaf by leaf: zeros would cost less energy, and time."""

    config: ModelConfig
    tokenizer: Words
    params: Params
    vae: Params


def make_model(config: ModelConfig, dtype: jnp.dtype) -> RandomModel:
    def draw(model: Functional) -> Params:
        leaves, tree = jax.tree.flatten(model.shapes)
        one = jax.jit(lambda key, shape: (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype),
                      static_argnums=1)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return jax.tree.unflatten(tree, [one(key, leaf.shape) for key, leaf in zip(keys, leaves)])
    params = draw(programs.network(config))
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, Words.eos].set(0)
    return RandomModel(config, Words(), params, draw(programs.autoencoder(config)))


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Matmul weights that a latent token meets, and those that a token of text does."""
    shapes = programs.network(config).shapes
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in zip(paths_of(shapes), jax.tree.leaves(shapes))}
    count = lambda *prefixes: sum(size for path, size in sizes.items()
                                  if path.startswith(prefixes) and path.endswith("kernel"))
    return count("decoder.layers.gen"), count("decoder.layers.und", "lm_head")


def useful_flops(generator: Generator, state: State, flow: FlowConfig) -> float:
    """Of all passes of one batch of images: real tokens, visible pairs."""
    config, settings = generator.model_config, generator.config
    tokens = settings.height * settings.width // config.pixels_per_token**2
    weights, _ = count_weights(config)
    low, high = np.float32(flow.cfg_interval)
    times = timesteps(flow)[:-1]
    guided = int(((times > low) & (times <= high)).sum()) if flow.cfg_text_scale > 1 else 0
    views = [state.main.view, state.unasked]
    if flow.needs_cfg_img:
        unseen = generator.without_images(state)
        views.append(getattr(unseen, "view", unseen))
    total, block = 0.0, tokens + 2
    for place, view in enumerate(views):
        passes = guided if place else len(times)
        seen = (np.asarray(view.rows.order) != INF).sum(1)   # of each trajectory
        pairs = block * (seen + block)
        channels = config.llm.num_hidden_layers * config.llm.num_attention_heads * config.llm.head_dim
        total += passes * float((2 * weights * block + 4 * channels * pairs).sum())
    return total


class Stopwatch:
    """Seconds of the parts of a trajectory, each waited for."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = jax.block_until_ready(work())
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        return result


def draw_pair(generator: Generator, batch: int, watch: Stopwatch) -> list[tuple[State, float]]:
    """One batch of trajectories; the states that images were drawn after, and the tokens of each text."""
    config, rng = generator.config, np.random.default_rng(0)
    words = lambda count: " ".join(map(str, rng.integers(5, generator.model_config.llm.vocab_size, count)))
    state = generator.begin([words(PROMPT) for _ in range(batch)], seeds=range(batch))
    drawn = []
    for turn in (1, 2):
        written = watch(f"write{turn}", lambda: generator.write(state))
        length = float(np.mean(np.asarray(written.lengths)))
        state = watch(f"read{turn}", lambda: _with_leaves(generator.think(state, generator.decode(written))[1]))
        size = {"height": config.height, "width": config.width}
        latent = watch(f"draw{turn}", lambda: generator.draw_latent(state, **size))
        images = watch(f"show{turn}", lambda: generator.show(latent, config.height))
        drawn.append((state, length))
        if turn == 1:
            kept = dataclasses.replace(state, main=state.main._replace(kv=None))   # its cache is used up
            drawn[0] = (kept, length)
            state = watch("look", lambda: _with_leaves(generator.look(state, images)))
    return drawn


def _with_leaves(state: State) -> State:
    jax.block_until_ready(state.main.kv)
    return state


def measure(generator: Generator, batch: int) -> dict[str, Any]:
    first, steady = Stopwatch(), Stopwatch()
    begun = time.perf_counter()
    draw_pair(generator, batch, first)
    first_seconds, begun = time.perf_counter() - begun, time.perf_counter()
    drawn = draw_pair(generator, batch, steady)
    seconds, parts = time.perf_counter() - begun, steady.seconds
    config, model = generator.config, generator.model_config
    work = [useful_flops(generator, state, config.flow(turn)) for turn, (state, _) in enumerate(drawn)]
    device, dtype = jax.devices()[0], jnp.dtype(config.dtype)
    peak = peak_flops(device.device_kind) or 1e12 * matmul_tflops(dtype, SIDE)
    rate = sum(work) / (parts["draw1"] + parts["draw2"])
    texts = sum(length for _, length in drawn)
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in device.device_kind), None)
    token_limit = count_weights(model)[1] * dtype.itemsize / bandwidth if bandwidth else None
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "batch": batch, "height": config.height, "words": texts / 2, "first_pair_seconds": first_seconds,
        "pair_seconds": seconds / batch, "parts_seconds": parts,
        "image_seconds": [(parts[f"draw{turn}"] + parts[f"show{turn}"]) / batch for turn in (1, 2)],
        "ms_per_step_of_text": 1e3 * (parts["write1"] + parts["write2"]) / texts,
        "limit_ms_per_step_of_text": 1e3 * token_limit if token_limit else None,
        "drawing_pflop": [each / batch / 1e15 for each in work], "drawing_tflops": rate / 1e12,
        "limit_tflops": peak / 1e12, "of_limit": rate / peak,
        "peak_memory_gib": (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30,
        "memory_is_of": "device" if used else "process"}


def settings_of(values: Any) -> tuple[ModelConfig, SamplingConfig]:
    """What is drawn with, by the flags."""
    if values.size == "7b":
        model, config = BAGEL_7B_MOT, SamplingConfig(cache_multiple=2048)
        if values.layers:
            llm = dataclasses.replace(model.llm, num_hidden_layers=values.layers)
            model = dataclasses.replace(model, llm=llm)
    else:
        model = read_config("assets/shapes_base")
        config = from_config_dict(SamplingConfig, shapes_generate.get_config())
    side, steps = values.side or config.height, values.num_timesteps
    flow = lambda settings: dataclasses.replace(settings, num_timesteps=steps or settings.num_timesteps)
    return model, dataclasses.replace(
        config, height=side, width=side, turn1=flow(config.turn1), turn2=flow(config.turn2),
        text=dataclasses.replace(config.text, max_length=values.words or WORDS[values.size], do_sample=False),
        system_prompt=" ".join(["5"] * SYSTEM))


def main(values: Any) -> None:
    model, config = settings_of(values)
    about = {"benchmark": f"generate_{values.size}", "device": jax.devices()[0].device_kind,
             "layers": model.llm.num_hidden_layers, **machine.describe("jax", "flax", "numpy")}
    generator = Generator(make_model(model, jnp.dtype(config.dtype)), config)
    result = about | measure(generator, values.batch or (1 if values.size == "7b" else config.batch_size))
    machine.keep(result, values.out or machine.RESULTS / f"generate_{values.size}.json")


if __name__ == "__main__":
    flags.DEFINE_enum("size", "shapes", ["7b", "shapes"], "Which model.")
    flags.DEFINE_integer("batch", None, "Trajectories at once; 1 of the 7b, the config's of the miniature.",
                         lower_bound=1)
    flags.DEFINE_integer("words", None, "Tokens of a thought; 300 of the 7b, 60 of the miniature.",
                         lower_bound=2)
    flags.DEFINE_integer("side", None, "Pixels of an image's side; the config's by default.", lower_bound=1)
    flags.DEFINE_integer("layers", None, "Of the 7b's decoder; 28 by default.", lower_bound=1)
    flags.DEFINE_integer("num_timesteps", None, "Instead of the config's.", lower_bound=2)
    flags.DEFINE_string("out", None, "The result file.")
    command.run(main)
