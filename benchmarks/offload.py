"""What a chip carries when Adam's moments lie in the host's memory, by three ways to update them.

    PYTHONPATH=.venv/libtpu python -m benchmarks.offload

Compiles, for one v6e chip that is not there, a step of a small network of eight stacks of four layers (4 GiB
of parameters, 8 GiB of moments, float32): moments on the chip; brought as a whole and taken back after the
update; layer by layer in a scan. GiB are arguments and temporaries of the chip; the limit is that of the first
way without its moments. Some minutes of compilation a way. Prints one JSON object last and writes it to
benchmarks/results/offload.json.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from jax.sharding import SingleDeviceSharding

from benchmarks import machine
from data_pipelines import command
from irg_jax.parallel.compiling import GIB
from irg_jax.parallel.topologies import compile_devices, find_topology

TOPOLOGY, LAYERS, WIDTH, INNER, TOKENS = "v6e:1x1", 4, 2048, 16384, 4096
WAYS = ("on the chip", "whole", "layer by layer")


def loss(stacks: list[jax.Array], x: jax.Array) -> jax.Array:
    for kernel in stacks:
        for layer in range(LAYERS):
            half = kernel[layer].astype(jnp.bfloat16)
            x = x + jnp.tanh(x @ half) @ half.T
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def update(kernel: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    return kernel - 1e-4 * m / (jnp.sqrt(v) + 1e-8), m, v


def moved(kernel: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    """The update of what is brought from the host and taken back."""
    kernel, m, v = update(kernel, *jax.device_put((m, v), jax.memory.Space.Device), g)
    return kernel, *jax.device_put((m, v), jax.memory.Space.Host)


def step(way: str, stacks: list[jax.Array], m: list[jax.Array], v: list[jax.Array], x: jax.Array):
    grads = jax.grad(loss)(stacks, x)
    norm = optax.tree.norm(grads)
    grads = [g / norm for g in grads]
    in_layers = lambda *leaf: jax.lax.scan(lambda _, layer: (None, moved(*layer)), None, leaf)[1]
    one = {"on the chip": update, "whole": moved, "layer by layer": in_layers}[way]
    return tuple(map(list, zip(*map(one, stacks, m, v, grads), strict=True)))


def measure(way: str, stacks: int) -> dict[str, Any]:
    chip = SingleDeviceSharding(compile_devices(find_topology(TOPOLOGY))[0])
    there = chip if way == "on the chip" else chip.with_memory_kind("pinned_host")
    of = lambda where: [jax.ShapeDtypeStruct((LAYERS, WIDTH, INNER), jnp.float32, sharding=where)] * stacks
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16, sharding=chip)
    jitted = jax.jit(functools.partial(step, way), donate_argnums=(0, 1, 2),
                     out_shardings=([chip] * stacks, [there] * stacks, [there] * stacks))
    traced = jitted.trace(of(chip), of(there), of(there), x)
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    return {"chip_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
            "host_gib": memory.host_argument_size_in_bytes / GIB}


def main(values: Any) -> None:
    jax.config.update("jax_platforms", "cpu")
    about, ways = machine.describe("jax", "libtpu"), {}
    for way in WAYS:
        ways[way] = measure(way, values.stacks)
        print(f"{way}: {ways[way]['chip_gib']:.2f} GiB on the chip", flush=True)
    limit = ways["on the chip"]["chip_gib"] - 2 * values.stacks * LAYERS * WIDTH * INNER * 4 / GIB
    machine.keep({"benchmark": "offload", **about, "topology": TOPOLOGY, "stacks": values.stacks,
                  "limit_gib": limit, "ways": ways}, values.out)


if __name__ == "__main__":
    flags.DEFINE_integer("stacks", 8, "Stacks of layers; 0.5 GiB each.", lower_bound=1)
    flags.DEFINE_string("out", str(machine.RESULTS / "offload.json"), "The result file.")
    command.run(main)
