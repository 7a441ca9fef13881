"""Response backpressure: limit the memory held by responses to slow clients.

    replica ─whole response─▶ within the memory limit? ─yes─▶ send chunk by chunk, at the speed of the client ─▶ client
                                        └─no─▶ 429               └─timeout─▶ drop the rest

The middleware runs in Ray Serve's proxy, which owns the client connections. The replica is free for other requests
while a slow client reads its response.
"""

from __future__ import annotations

import os
from asyncio import timeout
from collections.abc import Iterator

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bsq_ray.serving.errors import response_memory_error
from bsq_ray.serving.http.body_prefetch import PrefetchBodyMiddleware, prefetched_bytes
from bsq_ray.serving.service_config import MAX_RESPONSE_MB_VARIABLE, PREFETCH_BODIES_VARIABLE

_MB = 1_000_000
# Bytes per `send`; the connection buffers the same amount before `send` blocks.
_CHUNK_BYTES = 2**16


class ResponseBackpressureMiddleware:
    """Limits the memory of all responses that clients are reading.

    Args:
        max_response_mb: maximum MB of all responses in progress and of the prefetched bodies of their requests. A
            single response may be larger.
        timeout_s: timeout for a client to read 64 KB. After a timeout the rest of the response is dropped.
    """

    def __init__(self, app: ASGIApp, max_response_mb: float, timeout_s: float = 30.0) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_response_mb * _MB, timeout_s
        self._buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_message: Message | None = None
        is_aborted, body_bytes = False, prefetched_bytes(scope)

        async def send_with_timeout(message: Message) -> None:
            async with timeout(self._timeout_s):
                await send(message)

        async def send_in_chunks(message: Message) -> None:
            nonlocal start_message, is_aborted
            if is_aborted:
                return
            if message["type"] == "http.response.start":
                # Deferred until the size of the first body part is known, because the status may become 429.
                start_message = message
                return
            num_bytes = len(message.get("body", b"")) + body_bytes
            is_aborted = self._buffered_bytes > 0 and self._buffered_bytes + num_bytes > self._max_bytes
            self._buffered_bytes += num_bytes
            try:
                if is_aborted and start_message is not None:
                    await _error_response()(scope, receive, send_with_timeout)
                if is_aborted:
                    return
                if start_message is not None:
                    await send_with_timeout(start_message)
                    start_message = None
                for chunk in _chunks(message):
                    await send_with_timeout(chunk)
            except TimeoutError:
                is_aborted = True
            finally:
                self._buffered_bytes -= num_bytes

        await self._app(scope, receive, send_in_chunks)


def _error_response() -> JSONResponse:
    error = response_memory_error()
    return JSONResponse({"error": error.message}, error.status, {"Retry-After": str(error.retry_after)})


def _chunks(message: Message) -> Iterator[Message]:
    body, more_body = message.get("body", b""), message.get("more_body", False)
    for start in range(0, max(1, len(body)), _CHUNK_BYTES):
        end = start + _CHUNK_BYTES
        yield {**message, "body": body[start:end], "more_body": more_body or end < len(body)}


def middlewares() -> list[Middleware]:
    """Return the middlewares of Ray Serve's proxies, which import this function by a path in an environment variable.

    Raises:
        ValueError: the limit in the environment is not a number of MB above 0.
    """
    text = os.environ.get(MAX_RESPONSE_MB_VARIABLE, "512")
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0
    if not megabytes > 0:
        raise ValueError(f"{MAX_RESPONSE_MB_VARIABLE}={text}: give a number of MB above 0")
    backpressure = [Middleware(ResponseBackpressureMiddleware, max_response_mb=megabytes)]
    if os.environ.get(PREFETCH_BODIES_VARIABLE, "1") == "0":
        return backpressure
    return [*backpressure, Middleware(PrefetchBodyMiddleware)]
