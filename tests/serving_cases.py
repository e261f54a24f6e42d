"""What the tests of serving share: a server in a thread, and requests to it."""

import base64
import contextlib
import functools
import io
import json
import socket
import threading
import time

import numpy as np
import uvicorn
from PIL import Image

from irg_jax.sampling.trajectory import Generator
from irg_jax.serving.app import make_app
from irg_jax.serving.config import ServeConfig
from sampling_cases import WIDE, make_model

DRAW, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"
LIMITS = ServeConfig(max_batch=2, max_active=6, max_queue=100, max_body_mib=1, body_seconds=1.0,
                     max_image_pixels=10_000)
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
WORDS = ("a red circle", "blue", "two stars", "a b c")


def encoded(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def served(generator: Generator, limits: ServeConfig):
    """The address of a server in a thread."""
    port = free_port()
    app = make_app(generator, limits, model="small", hosts=["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@functools.cache
def make_generator() -> Generator:
    return Generator(make_model(), WIDE)


def draw(seed: int, **more) -> tuple[str, dict]:
    return DRAW, {"prompt": WORDS[seed % 4], "seed": seed, "do_sample": False, **more}


def edit(seed: int) -> tuple[str, dict]:
    return EDIT, {"prompt": WORDS[seed % 4], "seed": seed, "image": [encoded(PICTURE)]}


def ask(seed: int) -> tuple[str, dict]:
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(PICTURE)}"}}
    said = {"type": "text", "text": WORDS[seed % 4]}
    return CHAT, {"messages": [{"role": "user", "content": [shown, said]}], "seed": seed, "temperature": 0}


def read_events(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
