"""What is answered: bodies and events of OpenAI's form, with IRG's turns beside."""

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from irg_jax.sampling.trajectory import Turn
from irg_jax.serving.requests import Wanted

IDLE = ": nothing yet\n\n"   # a comment that keeps a connection open


def encode_image(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def image_answer(wanted: Wanted, answers: Sequence[tuple[Turn, ...]]) -> dict[str, Any]:
    """The last image of each trajectory, its text as `revised_prompt`; if wanted with all turns."""
    data = []
    for number, turns in enumerate(answers):
        made = [{"text": turn.text, "b64_json": encode_image(turn.image)}
                for turn in (turns if wanted.turns else turns[-1:])]
        data.append({"b64_json": made[-1]["b64_json"], "revised_prompt": turns[-1].text,
                     "seed": wanted.seed_of(number)} | ({"turns": made} if wanted.turns else {}))
    return {"created": int(time.time()), "data": data}


def image_event(wanted: Wanted, index: int, turn: int, made: str | np.ndarray
                ) -> tuple[str, dict[str, Any]] | None:
    """Kind and fields of the event of a text or an image; None for a partial image that is not wanted."""
    fields = {"index": index, "turn": turn + 1, "seed": wanted.seed_of(index), "created_at": int(time.time())}
    if isinstance(made, str):
        return "image_generation.text", fields | {"text": made}
    height, width = made.shape[:2]
    kind = "completed" if turn + 1 == wanted.mode.num_turns else "partial_image"
    if kind == "partial_image":
        if wanted.partial_images is not None and turn >= wanted.partial_images:
            return None
        fields["partial_image_index"] = turn
    return f"image_generation.{kind}", fields | {"b64_json": encode_image(made), "size": f"{width}x{height}",
                                                 "output_format": "png"}


def chat_answer(model: str, answer: Turn) -> dict[str, Any]:
    return _chat("chat.completion", model, {"message": {"role": "assistant", "content": answer.text},
                                            "finish_reason": _reason(answer)})


def chat_chunks(model: str, answer: Turn) -> list[dict[str, Any]]:
    """A text is written as a whole, so there is one chunk of it, and one that ends it."""
    return [_chat("chat.completion.chunk", model, {"delta": delta, "finish_reason": reason})
            for delta, reason in (({"role": "assistant", "content": answer.text}, None), ({}, _reason(answer)))]


def _reason(answer: Turn) -> str:
    return "stop" if answer.has_ended else "length"


def _chat(kind: str, model: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"chatcmpl-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": model,
            "choices": [{"index": 0, "logprobs": None, **choice}]}


def error_body(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def server_event(name: str | None, fields: dict[str, Any] | str) -> str:
    """A server-sent event; OpenAI's client looks for its name in `type`."""
    if name is None:
        return f"data: {fields if isinstance(fields, str) else json.dumps(fields)}\n\n"
    return f"event: {name}\ndata: {json.dumps({'type': name, **fields})}\n\n"
