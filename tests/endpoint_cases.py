"""A real HTTP server on this machine that answers as an OpenAI-compatible endpoint, and misbehaves on order."""

import base64
import collections
import contextlib
import hashlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

# What may become of a request. `slow` sleeps longer than an impatient client waits, `drip` sends a byte now and
# then.
FAULTS = ("429", "500", "slow", "drip", "truncated", "wrong", "deep", "html", "closed", "empty")
SLOW = 1.5    # seconds
Answer = Callable[[dict[str, Any]], str | np.ndarray]


class Misbehaving:
    """`answer` is asked with the body; `faults(key, number)` names what becomes of try `number` of a body."""

    def __init__(self, answer: Answer, faults: Callable[[str, int], str] = lambda key, number: ""):
        self.answer, self.faults = answer, faults
        self.tries: collections.Counter[str] = collections.Counter()      # requests by digest of path and body
        self.answered: collections.Counter[str] = collections.Counter()   # of these, those answered well
        self.bodies: dict[str, dict[str, Any]] = {}
        self.headers: list[dict[str, str]] = []
        self.peak = self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator["Misbehaving"]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def respond(self, path: str, body: dict[str, Any]) -> tuple[str, bytes]:
        """The fault, "" for none, and the answer."""
        key = hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()
        with self._lock:
            number = self.tries[key]
            self.tries[key] += 1
            self.bodies[key] = body
        fault = self.faults(key, number)
        made = self.answer(body)
        if isinstance(made, str):
            reply = {"model": "served", "choices": [{"message": {"role": "assistant", "content": made}}],
                     "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        else:
            file = io.BytesIO()
            Image.fromarray(made).save(file, format="PNG")
            reply = {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}],
                     "usage": {"input_tokens": 20, "output_tokens": 0}}
        if not fault:
            with self._lock:
                self.answered[key] += 1
        return fault, json.dumps(reply).encode()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with served._lock:
                    served._now += 1
                    served.peak = max(served.peak, served._now)
                    served.headers.append({name.lower(): value for name, value in self.headers.items()})
                try:
                    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                    self._send(*served.respond(self.path, body))
                except OSError:
                    self.close_connection = True    # who waited has gone
                finally:
                    with served._lock:
                        served._now -= 1

            def _send(self, fault: str, raw: bytes) -> None:
                status, extra = 200, {}
                if fault.isdigit():
                    status, raw = int(fault), json.dumps({"error": {"message": f"told {fault}"}}).encode()
                    extra = {"Retry-After": "0"} if fault == "429" else {}
                if fault == "declined":
                    status, raw = 400, b'{"error": {"code": "moderation_blocked", "message": "told no"}}'
                if fault == "slow":
                    time.sleep(SLOW)
                cut = {"truncated": raw[:len(raw) // 2], "wrong": b'{"answer": 42}', "html": b"<html>",
                       "deep": b"[" * 100_000, "empty": b""}.get(fault, raw)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(cut)),
                                    **extra}.items():
                    self.send_header(name, value)
                self.end_headers()
                if fault == "closed":
                    self.wfile.write(cut[:5])
                    self.close_connection = True
                    return
                if fault == "drip":
                    for byte in cut[:40]:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(SLOW / 15)
                self.wfile.write(cut)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def texts_of(body: dict[str, Any]) -> str:
    """All that a chat's messages say, images left out."""
    said = []
    for message in body.get("messages", []):
        content = message["content"]
        said += [content] if isinstance(content, str) else [part["text"] for part in content
                                                              if part["type"] == "text"]
    return "\n".join(said)


def images_of(body: dict[str, Any]) -> list[np.ndarray]:
    """The images of a chat's messages."""
    parts = [part for message in body.get("messages", []) if not isinstance(message["content"], str)
             for part in message["content"] if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",", 1)[1]))))
            for part in parts]
