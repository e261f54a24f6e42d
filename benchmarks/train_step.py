"""A training step of BAGEL-7B-MoT at real width and a few layers: seconds, useful TFLOP/s, and MFU.

    python -m benchmarks.train_step                     # one GPU of 80 GB or more, or a TPU: minutes
    python -m benchmarks.train_step --layers 1 --vit_layers 1 --vocab_size 8192 --side 128   # a CPU; not tried

One pack of simulated IRGL records under the budgets of the config goes through the step that training compiles:
images encoded inside, layers computed again, AdamW and EMA. All 28 layers fit on no single chip; so two depths
are timed, and what a layer takes is their difference: `scaled` is the whole network on a chip with memory
enough that waits for no other. Useful work is that of `irg_jax.training.planned.model_flops`: real tokens and
visible pairs, nothing twice. `official` is BAGEL's own formula, by which its published MFU was counted (17.9
and 23.7 % on H100): head and embedding for all tokens, all pairs of a sample, no ViT. The limit is the chip's
dense bf16 peak; of a device without a figure, the rate of one large matmul. Prints one JSON object last and
writes benchmarks/results/train_step.json.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import machine
from benchmarks.attention import matmul_tflops
from data_pipelines import command
from data_pipelines.batch import PackedBatch
from data_pipelines.config import DataConfig, ImageTransform, from_config_dict, load_config
from data_pipelines.planning import Planner
from data_pipelines.simulation import simulate
from irg_jax.config import BAGEL_7B_MOT, TrainConfig
from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.parallel.topologies import CHIPS
from irg_jax.training.abstract import trace_encoder, trace_step
from irg_jax.training.optimizer import make_optimizer
from irg_jax.training.planned import RECORDS, lay_out, measure_pack, model_flops
from irg_jax.training.state import create_state

CONFIG = "configs/irgl_stage1.py"
STEPS = 5
TILE = 512      # for the pack's statistics alone
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v4": CHIPS["v4"].flops,
         "TPU v5 lite": CHIPS["v5e"].flops, "TPU v5": CHIPS["v5p"].flops, "TPU v6 lite": CHIPS["v6e"].flops}


def small_images(data: DataConfig, side: int) -> DataConfig:
    """Images of at most `side` pixels, a multiple of 16, and budgets to match."""
    share = (side / data.vae_transform.max_size) ** 2
    room = lambda tokens: int(1.3 * share * tokens) + 16
    vit = side // 14 * 14
    return dataclasses.replace(
        data, vae_transform=ImageTransform(stride=16, max_size=side, min_size=side // 2),
        vit_transform=ImageTransform(stride=14, max_size=vit, min_size=vit // 28 * 14),
        vit_tokens=room(data.vit_tokens), latent_tokens=room(data.latent_tokens))


def make_pack(data: DataConfig, vocab_size: int) -> PackedBatch:
    """The first planned pack [1, ...], with random words and pixels: zeros would cost less energy, and time."""
    tables = simulate(data, records=RECORDS)
    pack = lay_out(Planner(data, tables)[0], data, tables)
    rng = np.random.default_rng(0)
    grey = lambda array: rng.integers(0, 256, array.shape, np.uint8)
    return pack._replace(text_ids=rng.integers(0, vocab_size, pack.text_ids.shape, np.int32),
                         vit_patches=grey(pack.vit_patches), latent_pixels=grey(pack.latent_pixels))


def official_flops(pack: PackedBatch, model: ModelConfig) -> float:
    """By the formula of BAGEL's train/pretrain_unified_navit.py."""
    llm = model.llm
    heads = 2 * llm.head_dim * (llm.num_attention_heads + llm.num_key_value_heads)
    layer = llm.hidden_size * (heads + 3 * llm.intermediate_size)
    firsts = np.concatenate([rows.first[rows.last >= 0]
                             for rows in (pack.text_rows, pack.vit_rows, pack.latent_rows)])
    _, lengths = np.unique(firsts, return_counts=True)   # a sample's tokens name its first
    weights = llm.num_hidden_layers * layer + 2 * llm.vocab_size * llm.hidden_size
    pairs = llm.num_hidden_layers * llm.num_attention_heads * llm.head_dim * float(np.sum(lengths**2.0))
    return 6.0 * weights * len(firsts) + 12.0 * pairs


def time_step(config: TrainConfig, model: ModelConfig, pack: PackedBatch) -> dict[str, float]:
    """Seconds of a step after two, and what the device held."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    step = trace_step(config, model, mesh)
    compiled = step.traced.lower().compile()
    shardings = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
    network = Functional(lambda rngs: IRG(model, rngs=rngs))
    vae = Functional(lambda rngs: make_autoencoder(model, rngs=rngs))
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    state = jax.jit(lambda: create_state(network.init(0), optimizer), out_shardings=shardings(step.state))()
    vae_params = jax.jit(lambda: vae.init(1), out_shardings=shardings(step.vae))()
    batch = jax.device_put(jax.tree.map(lambda x: np.asarray(x)[None], pack), shardings(step.batch))
    seconds = []
    for _ in tqdm(range(STEPS + 2), f"{model.llm.num_hidden_layers} layers", disable=None, leave=False):
        begun = time.perf_counter()
        state, metrics = compiled(state, vae_params, batch)
        if not np.isfinite(float(metrics["loss"])):
            raise ValueError(f"the loss is {float(metrics['loss'])}; a step of this speed is worth nothing")
        seconds.append(time.perf_counter() - begun)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"step_seconds": statistics.median(seconds[2:]), "peak_gib": peak and round(peak / 2**30, 2)}


def rates(seconds: float, useful: float, official: float, limit: float) -> dict[str, float]:
    digits = lambda value: float(f"{value:.4g}")
    return {"step_seconds": digits(seconds), "useful_tflop": digits(useful / 1e12),
            "useful_tflops": digits(useful / seconds / 1e12), "mfu": digits(useful / seconds / limit),
            "official_mfu": digits(official / seconds / limit)}


def measure(config: TrainConfig, depths: list[int], vit_layers: int, vocab_size: int, limit: float
            ) -> dict[str, Any]:
    """Each depth, and from two of them the whole."""
    def model_of(depth: int) -> ModelConfig:
        llm = dataclasses.replace(BAGEL_7B_MOT.llm, num_hidden_layers=depth, vocab_size=vocab_size)
        vit = dataclasses.replace(BAGEL_7B_MOT.vit, num_hidden_layers=vit_layers + 1)   # the last is not used
        return dataclasses.replace(BAGEL_7B_MOT, llm=llm, vit=vit)
    pack = make_pack(config.data, vocab_size)
    planned = measure_pack(pack, TILE)
    share = planned.latent / config.data.canvas**2
    image = count_flops(trace_encoder(config, BAGEL_7B_MOT).jaxpr).total * share

    def rated(depth: int, seconds: float) -> dict[str, float]:
        model = model_of(depth)
        return rates(seconds, model_flops(planned, model, image), official_flops(pack, model), limit)
    cases = []
    for depth in depths:
        timed = time_step(config, model_of(depth), pack)
        cases.append({"layers": depth, **timed, **rated(depth, timed["step_seconds"])})
    result = {"tokens": round(planned.text + planned.vit + planned.latent), "fill": round(planned.fill, 4),
              "vocab_size": vocab_size, "vit_layers": vit_layers, "cases": cases, "scaled": None}
    if len(cases) > 1:
        first, last = cases[0], cases[-1]
        layer = (last["step_seconds"] - first["step_seconds"]) / (last["layers"] - first["layers"])
        whole = BAGEL_7B_MOT.llm.num_hidden_layers
        seconds = last["step_seconds"] + layer * (whole - last["layers"])
        result["scaled"] = {"layers": whole, **rated(whole, seconds),
                            "tokens_per_second": result["tokens"] / seconds}
    return result


def main(values: Any) -> None:
    depths = sorted({int(depth) for depth in values.layers})
    if min(depths) < 1:
        raise ValueError(f"--layers is {','.join(values.layers)}; name depths of 1 or more")
    config = from_config_dict(TrainConfig, values.config or load_config(CONFIG))
    data = small_images(config.data, values.side) if values.side else config.data
    config = dataclasses.replace(config, accumulate=1, data=dataclasses.replace(data, packs_per_step=1))
    kind = jax.devices()[0].device_kind
    known = next((peak for name, peak in PEAKS.items() if name in kind), None)
    matmul = matmul_tflops() * 1e12
    result = {"benchmark": "train_step", "device": kind, **machine.describe("numpy", "jax", "flax", "optax"),
              "dtype": config.dtype, "peak_tflops": known and known / 1e12,
              "matmul_tflops": round(matmul / 1e12, 3),
              **measure(config, depths, values.vit_layers, values.vocab_size, known or matmul)}
    machine.keep(result, values.out)


if __name__ == "__main__":
    command.define_config(f"The configuration of a training stage; by default {CONFIG}.")
    flags.DEFINE_list("layers", ["1", "3"], "Depths of the language model; two or more are scaled to 28.")
    flags.DEFINE_integer("vit_layers", BAGEL_7B_MOT.num_vit_layers, "Layers of the vision encoder.",
                         lower_bound=1)
    flags.DEFINE_integer("vocab_size", BAGEL_7B_MOT.llm.vocab_size, "Tokens of the vocabulary.", lower_bound=8)
    flags.DEFINE_integer("side", 0, "Largest side of images, in pixels; 0 for the config's.", lower_bound=0)
    flags.DEFINE_string("out", str(machine.RESULTS / "train_step.json"), "The result file.")
    command.run(main)
