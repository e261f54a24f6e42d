r"""Serves a model over HTTP, by the forms of OpenAI's API.

    python -m irg_jax.serve --config configs/shapes_generate.py --checkpoint runs/shapes/stage2

    curl -N http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \
        -d '{"prompt": "two red circles", "stream": true}'

streams what each turn thinks and draws; without "stream" the answer is the last image. Also /v1/images/edits,
/v1/chat/completions, /v1/models, /health and /metrics (docs/serving.md). Requests that come together share
batches. Limits are `--config.serve.max_batch=8` and the like, see irg_jax/serving/config.py. On SIGTERM and
Ctrl-C it accepts nothing more, finishes what it has and ends with status 0.
"""

import logging
import signal
import time
from collections.abc import Sequence
from typing import Any

import uvicorn
from absl import flags

from data_pipelines import command
from data_pipelines.config import from_config_dict, to_plain
from irg_jax.parallel.sharding import find_mesh
from irg_jax.sampling.config import SamplingConfig
from irg_jax.sampling.modes import ModeConfig, infer
from irg_jax.sampling.opening import load_generator
from irg_jax.sampling.trajectory import Generator
from irg_jax.serving.app import make_app
from irg_jax.serving.config import ServeConfig
from irg_jax.serving.engine import batch_sizes

LOCAL = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")


def warm_up(generator: Generator, max_batch: int) -> None:
    """Compiles what usual requests need, alone and together."""
    think = bool(generator.config.system_prompt)
    mode = ModeConfig(think=think, num_turns=generator.config.num_turns if think else 1)
    for size in batch_sizes(max_batch):
        start = time.perf_counter()
        infer(generator, [["a picture"]] * size, mode, seeds=range(size))
        print(f"usual requests, {size} together: compiled in {time.perf_counter() - start:.1f} s", flush=True)


def known_hosts(host: str, allowed: Sequence[str]) -> list[str]:
    """The names that requests may call the server by: any ("*") if it listens everywhere and none is told."""
    if host in EVERYWHERE and not allowed:
        return ["*"]
    # With brackets as a browser sends them.
    return [f"[{name}]" if ":" in name else name for name in (*LOCAL, host, *allowed)]


def main(values: Any) -> None:
    fields = to_plain(values.config)
    limits = from_config_dict(ServeConfig, fields.pop("serve", {}), "serve")
    config = from_config_dict(SamplingConfig, fields)
    mesh = find_mesh(values.mesh)
    for name in ("stop_text", "stop_change"):
        if getattr(config, name):
            raise ValueError(f"{name} is {getattr(config, name)!r}; a stream says which image is its last as "
                             "soon as it is drawn, before a rule could tell: leave it out")
    generator, checkpoint = load_generator(values.checkpoint, config, prompts={}, mesh=mesh)
    size = generator.context_bytes(said=limits.max_tokens, num_turns=limits.max_turns,
                                   shown=limits.max_images) / 2**30
    print(f"a context takes about {size:.3g} GiB at most; {limits.max_active} are kept at once (max_active)",
          flush=True)
    if limits.warm_up:
        print("--config.serve.warm_up=False leaves compiling to the first requests", flush=True)
        warm_up(generator, limits.max_batch)
    hosts = known_hosts(values.host, values.allowed_host or ())
    if values.host not in LOCAL:
        named = "; it answers to any name, unless --allowed_host gives its own" if "*" in hosts else ""
        print(f"warning: whoever reaches {values.host} can use this server; no password is asked{named}",
              flush=True)
    app = make_app(generator, limits, model=values.model or checkpoint["path"], hosts=hosts)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):   # uvicorn raises them once more when it has ended
        signal.signal(number, lambda *_: None)
    uvicorn.run(app, host=values.host, port=values.port, access_log=False, server_header=False,
                limit_concurrency=limits.max_connections, timeout_graceful_shutdown=limits.closing_seconds)


if __name__ == "__main__":
    command.define_config("How to draw, e.g. configs/shapes_generate.py.")
    flags.DEFINE_string("checkpoint", None, "A model checkpoint, or the folder of a trained stage.")
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen at.")
    flags.DEFINE_integer("port", 8000, "The port to listen at.", lower_bound=1, upper_bound=65535)
    flags.DEFINE_multi_string("allowed_host", None, "A further name that requests may call the server by.")
    flags.DEFINE_string("model", None, "The model's name in answers; by default the checkpoint's path.")
    flags.DEFINE_string("mesh", "", "Devices to draw on, like data=4,tensor=2; by default the first alone.")
    flags.mark_flags_as_required(["config", "checkpoint"])
    command.run(main)
