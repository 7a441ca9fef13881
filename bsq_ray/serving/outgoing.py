"""Answers on their way to clients, and what those that read slowly may hold of them.

    replica ─answer, whole─▶ Outgoing ─a piece, as soon as the one before was taken─▶ client
                          room for it?─▶ 429

It runs in Ray Serve's proxy, to which the clients are connected: the replica is done long before they have read.
"""

from __future__ import annotations

import asyncio
import os

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bsq_ray.serving.refusals import busy
from bsq_ray.serving.settings import ANSWERS_VARIABLE

_MB = 1_000_000
# Bytes that are given to the connection at once; it waits when it holds as much.
_PIECE = 2**16


class Outgoing:
    """An ASGI application whose answers are read in time and take bounded memory.

    Args:
        answers_mb: of all answers that are being read.
        seconds: for a piece of 64 KB to be taken; then the client is cut off.
    """

    def __init__(self, app: ASGIApp, answers_mb: float, seconds: float = 30.0) -> None:
        self._app, self._most, self._seconds = app, answers_mb * _MB, seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carries out one request."""
        start: Message | None = None
        ended = scope["type"] != "http"

        async def in_pieces(message: Message) -> None:
            nonlocal start, ended
            if ended:
                return
            if message["type"] == "http.response.start":
                # The status is not sent before it is known that there is room for the answer.
                start = message
                return
            size = len(message.get("body", b""))
            if start is not None:
                first, start = start, None
                if size and self._held + size > self._most:
                    ended = True
                    refusal = busy()
                    headers = {"Retry-After": str(refusal.retry_after)}
                    await JSONResponse({"error": refusal.message}, refusal.status, headers)(scope, receive, send)
                    return
                await send(first)
            self._held += size
            try:
                for piece in _pieces(message):
                    await asyncio.wait_for(send(piece), self._seconds)
            except TimeoutError:
                ended = True
            finally:
                self._held -= size

        await self._app(scope, receive, send if ended else in_pieces)


def _pieces(message: Message) -> list[Message]:
    body, more = message.get("body", b""), message.get("more_body", False)
    starts = range(0, max(1, len(body)), _PIECE)
    return [
        {**message, "body": body[start : start + _PIECE], "more_body": more or start != starts[-1]} for start in starts
    ]


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxies put around the service, which they find by the name of this function.

    Raises:
        ValueError: the environment's limit is no number of MB.
    """
    text = os.environ.get(ANSWERS_VARIABLE, "512")
    try:
        megabytes = float(text)
    except ValueError:
        raise ValueError(f"{ANSWERS_VARIABLE}={text} is no number of MB") from None
    return [Middleware(Outgoing, answers_mb=megabytes)]
