"""Answers on their way to clients, and what those that read slowly may hold of them.

    replica ─answer, whole─▶ room for it? ─piece by piece, each after the one before was taken─▶ client
                        429 ◀──┘                                             dropped ◀──┘ not in time

It runs in Ray Serve's proxy, to which the clients are connected: the replica is done long before they have read.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bsq_ray.serving.errors import unread
from bsq_ray.serving.http.body_prefetch import Attaching, attached_bytes
from bsq_ray.serving.service_config import ANSWERS_VARIABLE

_MB = 1_000_000
# Bytes that are given to the connection at once; it waits when it holds as much.
_PIECE = 2**16


class Outgoing:
    """An ASGI application whose answers take bounded memory while they are read.

    Args:
        answers_mb: of all answers that are being read, with the small bodies of their requests; a single one may be
            larger.
        seconds: for a client to take 64 KB; then the rest of its answer is dropped.
    """

    def __init__(self, app: ASGIApp, answers_mb: float, seconds: float = 30.0) -> None:
        self._app, self._most, self._seconds = app, answers_mb * _MB, seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carries out one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        ended, attached = False, attached_bytes(scope)

        async def in_time(message: Message) -> None:
            async with asyncio.timeout(self._seconds):
                await send(message)

        async def in_pieces(message: Message) -> None:
            nonlocal start, ended
            if ended:
                return
            if message["type"] == "http.response.start":
                # The status is not sent before it is known that there is room for the answer.
                start = message
                return
            size = len(message.get("body", b"")) + attached
            ended = self._held > 0 and self._held + size > self._most
            self._held += size
            try:
                if ended and start is not None:
                    await _refusal()(scope, receive, in_time)
                if ended:
                    return
                if start is not None:
                    await in_time(start)
                    start = None
                for piece in _pieces(message):
                    await in_time(piece)
            except TimeoutError:
                ended = True
            finally:
                self._held -= size

        await self._app(scope, receive, in_pieces)


def _refusal() -> JSONResponse:
    refusal = unread()
    return JSONResponse({"error": refusal.message}, refusal.status, {"Retry-After": str(refusal.retry_after)})


def _pieces(message: Message) -> Iterator[Message]:
    body, more = message.get("body", b""), message.get("more_body", False)
    for start in range(0, max(1, len(body)), _PIECE):
        end = start + _PIECE
        yield {**message, "body": body[start:end], "more_body": more or end < len(body)}


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxies put around the service, which they find by the name of this function.

    Raises:
        ValueError: the environment's limit is no number of MB above 0.
    """
    text = os.environ.get(ANSWERS_VARIABLE, "512")
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0
    if not megabytes > 0:
        raise ValueError(f"{ANSWERS_VARIABLE}={text}: give a number of MB above 0")
    return [Middleware(Outgoing, answers_mb=megabytes), Middleware(Attaching)]
