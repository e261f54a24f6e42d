"""Asks models behind OpenAI-compatible endpoints: judges, critics and painters.

    endpoint = Endpoint(EndpointConfig("http://127.0.0.1:8000/v1", "Qwen2.5-VL-72B-Instruct"), folder)
    reply = endpoint.ask([said("Is it red?", images=[picture])], parse=read_yes_or_no)

An endpoint is slow, refuses, breaks off or answers nonsense, and each of these is something else:

    no answer, 408, 409, 425, 429, 5xx, or not what an API sends    sent again, after a growing pause
    another status, for what this one request says                  `Declined`: this one has no answer
    another status                                                  ends the command with what it said
    an answer cut off by max_tokens, or that `parse` refuses        asked again, then left without a value

FOLDER/<sha256 of the request>.json keeps every answer (an image as .png beside it), so that a command that was
interrupted pays for nothing twice. What answers cost that could not be used is in FOLDER/unused.jsonl, as far
as they told. The same request is the same answer whatever endpoint it went to: the model's name is part of it,
the address is not.
"""

import base64
import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import httpx2
import numpy as np
from PIL import Image

from data_pipelines.answers import (
    CHAT,
    IMAGES,
    Unusable,
    WrongForm,
    is_declined,
    parse_paid,
    read_chat,
    read_costs,
    read_image,
    read_kept,
    shorten,
)
from data_pipelines.digests import write_bytes, write_json
from data_pipelines.jobs import map_ahead

S, T = TypeVar("S"), TypeVar("T")
AGAIN = {408, 409, 425, 429}    # and 5xx
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0    # seconds
MAX_ANSWER = 64 * 2**20         # bytes; an image of 4096 x 4096 as base64 fits
UNUSED = "unused.jsonl"         # in the folder: what was paid for, and could not be used
CUT = "length"                  # why an answer ended that max_tokens cut off
AHEAD = 16                      # of what is asked at once: how much may be done before its turn


# An answer's JSON -> what is kept of it, and its image, uint8 [H, W, 3].
Read = Callable[[Any], tuple[dict[str, Any], np.ndarray | None]]


class EndpointError(ValueError):
    """An endpoint refuses, or gives no usable answer however often it is asked."""


class Declined(EndpointError):
    """An endpoint will not answer this one request for what it says; others it may."""


class BudgetSpent(ValueError):
    """What may be spent is spent; what was answered is kept."""


UNUSABLE = (httpx2.HTTPError, Unusable, UnicodeDecodeError, json.JSONDecodeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """One model behind an endpoint."""

    url: str                     # up to the version: https://api.openai.com/v1
    model: str
    key: str = ""                # name of the environment variable that holds the key; "" for none
    options: dict[str, Any] = dataclasses.field(default_factory=dict)   # fields of the body: {"temperature": 0}
    concurrency: int = 8         # requests under way at once
    timeout: float = 300.0       # seconds after which a request counts as not answered
    attempts: int = 8            # of one request that is not answered
    asks: int = 3                # of one question whose answers do not parse
    price_in: float = 0.0        # of a million tokens read
    price_out: float = 0.0       # of a million tokens written
    price_image: float = 0.0     # of an image drawn
    budget: float = 0.0          # nothing is sent once so much is spent, earlier runs included; 0: no limit

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; give the address up to the version, like "
                             "http://127.0.0.1:8000/v1")
        if not self.model:
            raise ValueError("model is empty; name the one that the endpoint is to use")
        for name in ("concurrency", "timeout", "attempts", "asks"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("price_in", "price_out", "price_image", "budget"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.budget and not (self.price_in or self.price_out or self.price_image):
            raise ValueError(f"budget is {self.budget}, but no price is known; set price_in and price_out of a "
                             "million tokens, or price_image")

    def cost(self, *, tokens_in: float = 0, tokens_out: float = 0, images: int = 0) -> float:
        """In the currency of the prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6 + images * self.price_image


@dataclasses.dataclass
class Usage:
    """What was asked. Tokens and cost are those of all answers that came, whichever run paid for them."""

    sent: int = 0        # requests that were answered in this run
    kept: int = 0        # requests whose answer was in the folder
    repeated: int = 0    # times that nothing usable came
    unparsed: int = 0    # answers that did not parse
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


class Reply(NamedTuple, Generic[T]):
    """What `parse` made of the last answer, None if it took none; the answers in order."""

    value: T | None
    texts: tuple[str, ...]


class Drawn(NamedTuple):
    """A PNG, and the `revised_prompt` that came with it: of `irg_jax.serve` what the model thought before."""

    file: pathlib.Path
    told: str


class Endpoint:
    """Safe to use from many threads."""

    def __init__(self, config: EndpointConfig, folder: str | os.PathLike):
        """Args: folder keeps the answers.

        Raises: ValueError if the environment lacks the key.
        """
        self.config, self.usage = config, Usage()
        self.served: set[str] = set()    # what models called themselves, as far as they told
        self._client = httpx2.Client(
            base_url=config.url.rstrip("/") + "/", headers=_authorization(config.key),
            timeout=httpx2.Timeout(config.timeout, pool=None),
            limits=httpx2.Limits(max_connections=config.concurrency))
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._is_ended = threading.Lock(), threading.Event()
        self._locks: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        for file in self._folder.glob("*.json"):
            self._add_mine(read_kept(file))
        unused = self._folder / UNUSED
        for line in unused.read_bytes().splitlines() if unused.is_file() else ():
            self._add_mine(parse_paid(line))

    def end(self) -> None:
        """Nothing is sent any more; what is under way may still be answered, and is kept."""
        self._is_ended.set()

    def ask(self, messages: Sequence[Mapping[str, Any]], *, parse: Callable[[str], T]) -> Reply[T]:
        """One question. `parse` raises ValueError for an answer it cannot read.

        Raises: EndpointError, of which Declined is one, and BudgetSpent.
        """
        texts = []
        for number in range(self.config.asks):
            # At temperature 0 the same seed would give the same answer.
            body = {"model": self.config.model, "messages": list(messages), **self.config.options}
            kept = self._answer(CHAT, body | ({"seed": number} if number else {}), read_chat)
            texts.append(kept["content"])
            try:
                if kept.get("finish") == CUT:
                    raise ValueError("cut off by max_tokens")
                return Reply(parse(texts[-1]), tuple(texts))
            except ValueError:
                with self._lock:
                    self.usage.unparsed += 1
        return Reply(None, tuple(texts))

    def draw(self, prompt: str, *, size: str = "1024x1024") -> Drawn:
        """An image for a prompt, as it is kept in the folder. Raises: as `ask`."""
        body = {"model": self.config.model, "prompt": prompt, "n": 1, "size": size, **self.config.options}
        kept = self._answer(IMAGES, body, read_image)
        return Drawn(self._folder / kept["content"], str(kept.get("told", "")))

    def _answer(self, path: str, body: dict[str, Any], read: Read) -> dict[str, Any]:
        """What the folder keeps of a request; it is sent if that is nothing yet."""
        key = hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()
        with self._lock:
            lock = self._locks[key]
        with lock:    # who asks the same at the same time waits for the answer
            file = self._folder / f"{key}.json"
            kept = read_kept(file)
            if kept is not None:
                with self._lock:
                    self.usage.kept += 1
                return kept
            kept, picture = self._send(path, body, read)
            if picture is not None:
                kept["content"] = f"{key}.png"
                write_bytes(self._folder / kept["content"], encode(picture))
            write_json(file, kept)
            with self._lock:
                self.usage.sent += 1
                self._add(kept)
            self._check_told(kept)
            return kept

    def _send(self, path: str, body: dict[str, Any], read: Read) -> tuple[dict[str, Any], np.ndarray | None]:
        for attempt in range(self.config.attempts):
            wait = 0.0
            if self._is_ended.is_set():
                raise EndpointError("ended before it was asked")
            self._check_budget()
            try:
                status, headers, raw = self._post(path, body)
                if status == 200:
                    return self._take(json.loads(raw), path, read)
                fault = f"status {status}: {shorten(raw)}"
                if status not in AGAIN and status < 500:
                    kind = Declined if is_declined(raw) else EndpointError
                    raise kind(f"{self._client.base_url}{path} refuses, {fault}")
                wait = _seconds(headers.get("retry-after", "")) or 0.0
            except WrongForm as error:
                raise EndpointError(f"{self._client.base_url}{path} {error}") from error
            except UNUSABLE as error:
                fault = f"{type(error).__name__}: {shorten(str(error).encode())}"
            with self._lock:
                self.usage.repeated += 1
            if attempt + 1 < self.config.attempts:
                pause = max(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE), wait)    # never sooner than told
                self._is_ended.wait(pause * random.uniform(1.0, 1.25))   # not all again at the same time
        raise EndpointError(f"{self._client.base_url}{path} gave no usable answer in {self.config.attempts} "
                            f"attempts; the last: {fault}. The same command goes on where this one ended")

    def _take(self, answer: Any, path: str, read: Read) -> tuple[dict[str, Any], np.ndarray | None]:
        """What is kept of an answer; one that cannot be used is paid for too."""
        paid = {"asked": self.config.model, **read_costs(answer, path)}
        try:
            kept, picture = read(answer)
        except (Unusable, WrongForm):
            with self._lock, open(self._folder / UNUSED, "a", encoding="utf-8") as file:
                file.write(json.dumps(paid) + "\n")
                self._add(paid)
            raise
        return kept | paid, picture

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        start, parts, size = time.monotonic(), [], 0
        with self._client.stream("POST", path, json=body) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER:
                    raise Unusable(f"more than {MAX_ANSWER} bytes")
                if time.monotonic() - start > self.config.timeout:
                    raise Unusable(f"no end after {self.config.timeout:g} s")
            return response.status_code, response.headers, b"".join(parts)

    def _check_budget(self) -> None:
        config = self.config
        if config.budget and self.usage.cost >= config.budget:
            raise BudgetSpent(f"budget {config.budget:g} is spent: {self.usage.cost:.4g} on {config.model}; "
                              "all answers are kept, and the same command with a larger budget goes on")

    def _check_told(self, kept: Mapping[str, Any]) -> None:
        config, told = self.config, kept["tokens_in"] or kept["tokens_out"]
        if config.budget and (config.price_in or config.price_out) and not told:
            raise EndpointError(f"budget is {config.budget:g}, but {config.model} tells no usage, so nobody "
                                "knows what it costs; the answer is kept. Set budget to 0, or let the server "
                                "tell usage")

    def _add_mine(self, kept: Mapping[str, Any] | None) -> None:
        if kept and kept["asked"] == self.config.model:
            self._add(kept)

    def _add(self, kept: Mapping[str, Any]) -> None:
        self.served |= {kept["model"]} - {""}
        self.usage.tokens_in += kept["tokens_in"]
        self.usage.tokens_out += kept["tokens_out"]
        self.usage.cost += self.config.cost(tokens_in=kept["tokens_in"], tokens_out=kept["tokens_out"],
                                            images=kept["images"])


def said(text: str, *, role: str = "user", images: Sequence[np.ndarray | bytes] = ()) -> dict[str, Any]:
    """A message; images, uint8 [H, W, 3] or PNG, follow the text."""
    if not images:
        return {"role": role, "content": text}
    encoded = (image if isinstance(image, bytes) else encode(image) for image in images)
    parts = [{"type": "image_url", "image_url": {
        "url": f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"}} for png in encoded]
    return {"role": role, "content": [{"type": "text", "text": text}, *parts]}


def encode(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def in_parallel(work: Callable[[S], T], items: Iterable[S], endpoints: Sequence[Endpoint]) -> Iterator[T]:
    """`work` of each item, in order, as many at once as the most patient endpoint takes.

    No more than AHEAD times as many are begun before their turn, so that results need not all be kept.
    The first error, or Ctrl-C, ends all: what is under way may still be answered, nothing else is sent.
    """
    faults: list[BaseException] = []    # in the order of time: the others fail because the first did

    def attempt(item: S) -> T:
        try:
            return work(item)
        except Exception as fault:
            end(fault)
            raise

    def end(fault: BaseException) -> None:
        faults.append(fault)
        for endpoint in endpoints:
            endpoint.end()

    threads = max(each.config.concurrency for each in endpoints)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        yield from map_ahead(pool, attempt, items, ahead=AHEAD * threads - 1)
    except GeneratorExit:    # who asked has enough
        raise
    except BaseException as fault:
        end(fault)
        raise faults[0]
    finally:
        pool.shutdown(cancel_futures=True)


def _authorization(variable: str) -> dict[str, str]:
    if not variable:
        return {}
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {variable} holds no key; export {variable}=..., or name "
                         "the variable that does")
    return {"Authorization": f"Bearer {key}"}


def _seconds(text: str) -> float | None:
    """Of a Retry-After header in seconds; a date, or nonsense, is None."""
    return min(float(text), LONGEST_PAUSE) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text.strip()) else None
