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

from bsq_ray.serving.errors import response_memory_exhausted
from bsq_ray.serving.http.body_prefetch import PrefetchBodyMiddleware, prefetched_bytes
from bsq_ray.serving.service_config import MAX_RESPONSE_MB_VARIABLE

_MB = 1_000_000
# Bytes that are given to the connection at once; it waits when it holds as much.
_CHUNK_BYTES = 2**16


class ResponseBackpressureMiddleware:
    """An ASGI application whose answers take bounded memory while they are read.

    Args:
        answers_mb: of all answers that are being read, with the small bodies of their requests; a single one may be
            larger.
        seconds: for a client to take 64 KB; then the rest of its answer is dropped.
    """

    def __init__(self, app: ASGIApp, max_response_mb: float, timeout_s: float = 30.0) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_response_mb * _MB, timeout_s
        self._buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carries out one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        is_closed, body_bytes = False, prefetched_bytes(scope)

        async def send_with_timeout(message: Message) -> None:
            async with asyncio.timeout(self._timeout_s):
                await send(message)

        async def send_in_chunks(message: Message) -> None:
            nonlocal start, is_closed
            if is_closed:
                return
            if message["type"] == "http.response.start":
                # The status is not sent before it is known that there is room for the answer.
                start = message
                return
            num_bytes = len(message.get("body", b"")) + body_bytes
            is_closed = self._buffered_bytes > 0 and self._buffered_bytes + num_bytes > self._max_bytes
            self._buffered_bytes += num_bytes
            try:
                if is_closed and start is not None:
                    await _error_response()(scope, receive, send_with_timeout)
                if is_closed:
                    return
                if start is not None:
                    await send_with_timeout(start)
                    start = None
                for chunk in _chunks(message):
                    await send_with_timeout(chunk)
            except TimeoutError:
                is_closed = True
            finally:
                self._buffered_bytes -= num_bytes

        await self._app(scope, receive, send_in_chunks)


def _error_response() -> JSONResponse:
    error = response_memory_exhausted()
    return JSONResponse({"error": error.message}, error.status, {"Retry-After": str(error.retry_after)})


def _chunks(message: Message) -> Iterator[Message]:
    body, more_body = message.get("body", b""), message.get("more_body", False)
    for start in range(0, max(1, len(body)), _CHUNK_BYTES):
        end = start + _CHUNK_BYTES
        yield {**message, "body": body[start:end], "more_body": more_body or end < len(body)}


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxies put around the service, which they find by the name of this function.

    Raises:
        ValueError: the environment's limit is no number of MB above 0.
    """
    text = os.environ.get(MAX_RESPONSE_MB_VARIABLE, "512")
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0
    if not megabytes > 0:
        raise ValueError(f"{MAX_RESPONSE_MB_VARIABLE}={text}: give a number of MB above 0")
    return [Middleware(ResponseBackpressureMiddleware, max_response_mb=megabytes), Middleware(PrefetchBodyMiddleware)]
