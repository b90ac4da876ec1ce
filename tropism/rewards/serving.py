"""A reward behind HTTP, in an environment of its own: ``GET /health``, ``GET /info``, ``POST /score`` (see ``wire``).

The pages and limits are in ``make_app``; what is done with a call is in ``Desk``, which knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
from collections import OrderedDict
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tropism.base import Reward

from .scores import to_values
from .wire import Call, Limits, Refused, reply, unpack

REMEMBERED = 256  # replies, for callers that did not hear the first time
FAILURES = 3  # different sentences in one reply


class Desk:
    """Answers calls, from any number of threads.

    ``parallel`` calls are scored at once; the others wait. It is 1 because models on a GPU, and much else, are not made
    for several threads. A call that comes again, byte for byte, gets the reply it would have got.
    """

    def __init__(
        self,
        reward: Reward,
        version: str,
        *,
        limits: Limits | None = None,
        device: torch.device | None = None,
        parallel: int = 1,
    ) -> None:
        self.reward, self.version = reward, version
        self.limits = limits or Limits()
        self._device = device or torch.device("cpu")
        self._turn = threading.BoundedSemaphore(parallel)
        self._replies: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._book = threading.Lock()

    def info(self) -> dict[str, Any]:
        """What a client wants to know before it sends pictures."""
        limits = {"max_bytes": self.limits.bytes, "max_images": self.limits.images, "max_pixels": self.limits.pixels}
        return {"name": self.reward.name, "version": self.version, "differentiable": False, **limits}

    def answer(self, content_type: str, body: bytes) -> dict[str, Any]:
        """The reply to the body of a call. Raises Refused."""
        call = unpack(content_type, body, self.limits)
        key = hashlib.sha256(body).digest()
        with self._turn:
            with self._book:
                known = self._replies.get(key)
            if known is not None:
                return known
            scores, failures = score_each(self.reward, call._replace(images=call.images.to(self._device)))
        said = reply(call, self.version, scores, failures)
        with self._book:
            self._replies[key] = said
            while len(self._replies) > REMEMBERED:
                self._replies.popitem(last=False)
        return said


@torch.no_grad()
def score_each(reward: Reward, call: Call) -> tuple[list[float | None], list[str]]:
    """B scores, None where there is none, and why. Where the batch as a whole fails, each picture is tried alone."""
    values, said = _tried(reward, call)
    if said is None:
        return values, []
    if len(call.prompts) == 1:
        return values, [said]
    singles = [_tried(reward, _row(call, row)) for row in range(len(call.prompts))]
    failures = [failure for _, failure in singles if failure is not None]
    return [value for alone, _ in singles for value in alone], list(dict.fromkeys(failures))[:FAILURES]


def _tried(reward: Reward, call: Call) -> tuple[list[float | None], str | None]:
    count = len(call.prompts)
    try:
        raw = reward(call.images, call.prompts, **call.columns)
        values = to_values(raw, count, f"reward '{reward.name}'", torch.device("cpu"))
        return [None if value != value else value for value in values.tolist()], None
    except Exception as error:  # a reward may raise anything, and the server goes on
        lines = str(error).strip().split("\n")
        return [None] * count, f"{type(error).__name__}: {lines[0][:300] or 'no message'}"


def _row(call: Call, row: int) -> Call:
    columns = {name: values[row : row + 1] for name, values in call.columns.items()}
    return Call(call.id, call.images[row : row + 1], call.prompts[row : row + 1], columns)


def make_app(desk: Desk, token: str | None = None) -> FastAPI:
    """The pages. With a token, all but /health want ``Authorization: Bearer TOKEN``, which is looked at before a call
    is read; no more of a call is read than the limit."""
    app = FastAPI(title="tropism reward", docs_url=None, redoc_url=None, openapi_url=None)

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(401, "the bearer token is missing or wrong; give the one that the server was started with")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info(request: Request) -> dict[str, Any]:
        check(request)
        return desk.info()

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        check(request)
        body = await _body(request, desk.limits.bytes)
        return JSONResponse(await run_in_threadpool(desk.answer, request.headers.get("content-type", ""), body))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _error(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        pages = "wanted GET /health, GET /info or POST /score"
        return _error(error.status_code, f"{str(error.detail).lower()}: {request.method} {request.url.path}; {pages}")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return _error(500, f"{type(error).__name__} in the server, a mistake in tropism; its log says where")

    return app


async def _body(request: Request, most: int) -> bytes:
    too_large = Refused(413, f"the call has more than {most} bytes; send fewer pictures at once")
    said = request.headers.get("content-length", "0")
    if re.fullmatch(r"[0-9]+", said) and int(said[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
    except ClientDisconnect as error:
        raise Refused(400, "the caller hung up before the end of the call") from error
    return bytes(body)


def _error(status: int, sentence: str) -> JSONResponse:
    clean = " ".join(sentence.encode("utf-8", "replace").decode().split())
    return JSONResponse({"error": clean}, status_code=status)
