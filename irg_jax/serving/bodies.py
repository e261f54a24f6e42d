"""The body of a request as fields, before anything is made of them: hostile until read."""

import asyncio
import base64
import json
import math
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from irg_jax.serving.config import ServeConfig

_MAX_FIELDS = 64
# Fields of a form are text; these are meant so, the others are JSON.
_TEXTS = ("prompt", "size", "model", "user", "response_format", "output_format", "cfg_renorm_type", "solver")


async def read_fields(request: Request, config: ServeConfig) -> dict[str, Any]:
    """The fields of a JSON object or a form; files of a form are `image`, in base64.

    Raises: ValueError if it is neither; HTTPException if it is too long, too slow or of another type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data"):
        raise HTTPException(415, f"content-type is {kind[:64]!r}; send application/json or multipart/form-data")
    try:
        async with asyncio.timeout(config.body_seconds):
            body = await _read(request, config.max_body_mib << 20)
    except TimeoutError as error:
        raise HTTPException(408, f"the body took over {config.body_seconds:g} s (body_seconds)") from error
    if kind == "multipart/form-data":
        return await _read_form(request, body, config)
    fields = _parse_json(body)
    if not isinstance(fields, dict):
        raise ValueError("the body is not a JSON object")
    return fields


async def _read(request: Request, limit: int) -> bytes:
    too_long = HTTPException(413, f"the body is over the limit of {limit} bytes (max_body_mib)")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_long
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
    return b"".join(parts)


async def _read_form(request: Request, body: bytes, config: ServeConfig) -> dict[str, Any]:
    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}
    fields: dict[str, Any] = {}
    images: list[str] = []
    async with Request(request.scope, replay).form(max_files=config.max_images, max_fields=_MAX_FIELDS,
                                                   max_part_size=len(body)) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name != "image":
                    raise ValueError(f"field {name[:64]!r} is a file; only 'image' is one")
                images.append(base64.b64encode(await value.read()).decode())
            elif name in fields:
                raise ValueError(f"field {name[:64]!r} is given twice")
            else:
                fields[name] = value if name in _TEXTS else _parse_json(value.encode())
    if images and "image" in fields:
        raise ValueError("field 'image' is given twice, as files and as text")
    return fields | ({"image": images} if images else {})


def _parse_json(data: bytes) -> Any:
    """What JSON says; numbers are finite and of ordinary size."""
    def refuse(text: str) -> None:
        raise ValueError(f"the number {text[:32]} is not allowed")

    def parse_int(text: str) -> int:
        return int(text) if len(text) < 19 else refuse(text)

    def parse_float(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)
    try:
        return json.loads(data.decode("utf-8"), parse_constant=refuse, parse_int=parse_int,
                          parse_float=parse_float)
    except RecursionError as error:
        raise ValueError("what was sent is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"what was sent is not valid JSON ({error})") from error
