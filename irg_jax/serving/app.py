"""The HTTP side: routes, limits, streams, errors.

    POST /v1/images/generations   a drawing, by default all turns of a trajectory
    POST /v1/images/edits         a picture by one that is shown, JSON or multipart
    POST /v1/chat/completions     a text about what is said and shown
    GET  /v1/models /health /metrics
"""

import asyncio
import contextlib
import logging
import secrets
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from irg_jax.sampling.trajectory import Generator
from irg_jax.serving import answers
from irg_jax.serving.bodies import read_fields
from irg_jax.serving.config import ServeConfig
from irg_jax.serving.engine import Closed, Engine, Full
from irg_jax.serving.metrics import CONTENT_TYPE, Metrics
from irg_jax.serving.requests import Reader, Wanted
from irg_jax.serving.trajectories import Failed, Trajectories

Handler = Callable[[Request], Awaitable[Response]]
GONE = 499    # the client closed the connection: a status for the figures, nobody reads it
RETRY_SECONDS = 10


class Service:
    """What answers requests."""

    def __init__(self, generator: Generator, config: ServeConfig, model: str):
        self._generator, self._config, self._model = generator, config, model
        self._metrics = Metrics()
        self._reader = Reader(generator, config)
        self.engine = Engine(generator, config, self._metrics)

    def routes(self) -> list[Route]:
        post = {"/v1/images/generations": self.draw, "/v1/images/edits": self.edit,
                "/v1/chat/completions": self.chat}
        get = {"/v1/models": self.models, "/health": self.health, "/metrics": self.metrics}
        return [*(Route(path, self._counted(path, handle), methods=["POST"]) for path, handle in post.items()),
                *(Route(path, handle) for path, handle in get.items())]

    async def draw(self, request: Request) -> Response:
        return await self._answer_images(request, is_edit=False)

    async def edit(self, request: Request) -> Response:
        return await self._answer_images(request, is_edit=True)

    async def _answer_images(self, request: Request, *, is_edit: bool) -> Response:
        fields = await read_fields(request, self._config)
        wanted = await asyncio.to_thread(self._reader.read_image_request, fields, secrets.randbits(32),
                                         is_edit=is_edit)
        trajectories = self._begin(wanted)
        if wanted.stream:
            return EventStream(_image_events(wanted, trajectories), trajectories)
        made = await trajectories.finish(request)
        return JSONResponse(await asyncio.to_thread(answers.image_answer, wanted, made))

    async def chat(self, request: Request) -> Response:
        fields = await read_fields(request, self._config)
        wanted = await asyncio.to_thread(self._reader.read_chat_request, fields, secrets.randbits(32))
        trajectories, model = self._begin(wanted), wanted.model or self._model
        if wanted.stream:
            return EventStream(_chat_events(model, trajectories), trajectories)
        ((answer,),) = await trajectories.finish(request)
        return JSONResponse(answers.chat_answer(model, answer))

    async def models(self, request: Request) -> Response:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "irg_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        status = "failed" if not self.engine.is_alive else "closing" if self.engine.is_closed else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    def _begin(self, wanted: Wanted) -> Trajectories:
        return Trajectories(self._generator, self.engine, wanted, self._config.timeout_seconds)

    def _counted(self, route: str, handle: Handler) -> Handler:
        async def call(request: Request) -> Response:
            start = time.perf_counter()
            count = lambda: self._metrics.answered(route, response.status_code, time.perf_counter() - start)
            try:
                _refuse_other_sites(request)
                response = await handle(request)
            except Exception as error:  # whatever it is becomes an answer; what is ours is logged
                response = _answer_error(error)
            if isinstance(response, EventStream):
                response.when_ended = count
            else:
                count()
            return response
        return call


class EventStream(StreamingResponse):
    """Server-sent events; trajectories that nobody reads of any more are given up."""

    def __init__(self, events: AsyncIterator[str], trajectories: Trajectories):
        super().__init__(_with_errors(events), media_type="text/event-stream",
                         headers={"Cache-Control": "no-store"})
        self._trajectories = trajectories
        self.when_ended: Callable[[], None] = lambda: None

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._trajectories.cancel()
            self.when_ended()


async def _with_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events, and if they break off why: the status is out already."""
    try:
        async for event in events:
            yield event
    except Exception as error:  # see `_counted`
        yield answers.server_event("error", _explain(error)[1])


async def _image_events(wanted: Wanted, trajectories: Trajectories) -> AsyncIterator[str]:
    async for made in trajectories.events():
        event = made and await asyncio.to_thread(answers.image_event, wanted, *made)
        if event or not made:
            yield answers.server_event(*event) if event else answers.IDLE


async def _chat_events(model: str, trajectories: Trajectories) -> AsyncIterator[str]:
    async for made in trajectories.events():
        if made is None:
            yield answers.IDLE
    ((answer,),) = trajectories.answers
    for chunk in answers.chat_chunks(model, answer):
        yield answers.server_event(None, chunk)
    yield answers.server_event(None, "[DONE]")


def _refuse_other_sites(request: Request) -> None:
    """A page of another site that a user looks at may not spend this server's time."""
    origin = request.headers.get("origin")
    if origin is not None and urllib.parse.urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, f"requests from pages of {origin[:100]!r} are not answered")


def _explain(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error; what is no fault of the request is logged, and not told."""
    match error:
        case HTTPException():
            return error.status_code, answers.error_body(error.detail, "invalid_request_error")
        case ValueError():
            return 400, answers.error_body(str(error), "invalid_request_error")
        case Full():
            return 429, answers.error_body("the queue is full (max_queue); try again later", "rate_limit_error")
        case Closed():
            return 503, answers.error_body("the server is shutting down", "server_error")
        case TimeoutError():
            return 504, answers.error_body("the request took too long (timeout_seconds)", "server_error")
        case ClientDisconnect():
            return GONE, answers.error_body("the client has gone", "invalid_request_error")
    if not isinstance(error, Failed):   # that is logged where it happened
        logging.error("a request failed", exc_info=error)
    return 500, answers.error_body("an error of the server; its log says which", "server_error")


def _answer_error(error: Exception) -> Response:
    status, body = _explain(error)
    return JSONResponse(body, status, headers={"Retry-After": str(RETRY_SECONDS)} if status == 429 else None)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    return _answer_error(error)


def make_app(generator: Generator, config: ServeConfig, *, model: str, hosts: Sequence[str]) -> Starlette:
    """The whole application; its engine ends with it.

    Args: model is its name in answers; hosts are the names that requests may call the server by.
    """
    service = Service(generator, config, model)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)
    known_hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    return Starlette(routes=service.routes(), lifespan=lifespan, middleware=[known_hosts],
                     exception_handlers={HTTPException: _answer_http_error})
