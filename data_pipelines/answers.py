"""What endpoints answer, read as if a stranger had written it, and no address is followed.

An answer is read twice: for what it costs, also if nothing else of it can be used, and for what it says.
"""

import base64
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.images import decode_image

CHAT, IMAGES = "chat/completions", "images/generations"    # what is asked for, below an endpoint's address
MAX_PIXELS = 2**24
TOLD = 300                      # letters of an answer in a message
DECLINES = {"content_policy_violation", "moderation_blocked", "content_filter"}    # codes of errors
_COUNTS = {CHAT: ("prompt_tokens", "completion_tokens"), IMAGES: ("input_tokens", "output_tokens")}
_PAID = {"asked": str, "model": str, "tokens_in": int, "tokens_out": int, "images": int}


class Unusable(Exception):
    """An answer that no such API gives; the next may be better."""


class WrongForm(Exception):
    """An answer in a form that was not wanted; the next will come in the same."""


def read_chat(answer: Any) -> tuple[dict[str, Any], None]:
    """The text of the first choice, "" if the model refused to say any, and why it ended.

    Raises: Unusable.
    """
    try:
        choice = answer["choices"][0]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
        if not isinstance(content, str | None):
            raise TypeError(f"content is of type {type(content).__name__}")
    except (LookupError, TypeError) as error:
        raise Unusable(f"not a chat completion: {shorten(json.dumps(answer).encode())}") from error
    return {"content": content or "", "finish": finish if isinstance(finish, str) else ""}, None


def read_image(answer: Any) -> tuple[dict[str, Any], np.ndarray]:
    """The words that came with the first image, and the image, uint8 [H, W, 3].

    Raises: Unusable; WrongForm if there is but an address.
    """
    try:
        entry = answer["data"][0]
        if "b64_json" not in entry and isinstance(entry.get("url"), str):
            raise WrongForm("answers with an image's address, which is not followed; set options "
                            "response_format=b64_json, if the model knows it")
        data = base64.b64decode(entry["b64_json"], validate=True)
        image = decode_image(data, where="an image of the endpoint", max_pixels=MAX_PIXELS)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise Unusable(f"not an image as b64_json ({error}): {shorten(json.dumps(answer).encode())}") from error
    told = entry.get("revised_prompt")
    return {"told": told if isinstance(told, str) else ""}, image


def read_costs(answer: Any, path: str) -> dict[str, Any]:
    """Tokens, images and the model's own name of itself, as far as an answer tells.

    Args: path that was asked, CHAT or IMAGES.
    """
    answer = answer if isinstance(answer, dict) else {}
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in _COUNTS[path]]
    tokens_in, tokens_out = (count if type(count) is int and count > 0 else 0 for count in counts)
    return {"tokens_in": tokens_in, "tokens_out": tokens_out, "model": str(answer.get("model", ""))[:TOLD],
            "images": int(path == IMAGES and bool(answer.get("data")))}    # one is asked for


def is_declined(raw: bytes) -> bool:
    """Whether an error is about the content of a request."""
    try:
        error = json.loads(raw)["error"]
        return isinstance(error["code"], str) and error["code"] in DECLINES
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def read_kept(file: pathlib.Path) -> dict[str, Any] | None:
    """An answer that is kept; what a stranger or a crash left there counts as none."""
    try:
        kept = parse_paid(file.read_bytes(), content=str)
    except OSError:
        return None
    picture = file.with_suffix(".png")
    is_whole = kept and (not kept["images"] or kept["content"] == picture.name and picture.is_file())
    return kept if is_whole else None


def parse_paid(raw: bytes, **fields: type) -> dict[str, Any] | None:
    """JSON that has the fields of costs, and these; None for all else."""
    try:
        paid = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    wanted: Mapping[str, type] = _PAID | fields
    is_good = isinstance(paid, dict) and all(isinstance(paid.get(name), kind) for name, kind in wanted.items())
    return paid if is_good else None


def shorten(raw: bytes) -> str:
    """The first TOLD letters on one line."""
    text = " ".join(raw[:4 * TOLD].decode("utf-8", "replace").split())
    return text if len(text) <= TOLD else f"{text[:TOLD]}..."
