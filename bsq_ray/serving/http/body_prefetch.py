"""Requests on their way to the front: a small body goes with its request.

    client ─▶ Ray Serve's proxy: Attaching ─request with its body─▶ front: Attached ─▶ api.py
                                           └─ a large or slow one: as far as it is there ─▶ the front asks for the rest

By itself Ray Serve's front asks the proxy for every body, and then whether the client is still there. Both cost as
much as the request itself, and the proxy cancels requests of clients that are gone without being asked.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Bytes of a body after which no more is waited for; the proxy has up to 256 KB more at a time.
_PREFETCH_BYTES = 2**17
# For them to arrive; how long the rest may take is the front's to say.
_PREFETCH_TIMEOUT_S = 0.05
# In the scope, on the way from the proxy to the front.
_SCOPE_KEY = "bsq_ray.messages"
# By which a client could have its request go on without it: then the proxy does not cancel.
_DISCONNECT_DISABLED_HEADER = b"x-request-disconnect-disabled"


class PrefetchBodyMiddleware:
    """An ASGI application whose scope holds what has arrived of the body, for `Attached`; it runs in the proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carries out one request."""
        if scope["type"] == "http":
            scope["headers"] = [header for header in scope["headers"] if header[0] != _DISCONNECT_DISABLED_HEADER]
            scope[_SCOPE_KEY] = await _prefetch_body(receive)
        await self._app(scope, receive, send)


class PrefetchedBodyMiddleware:
    """An ASGI application that receives first what came with the request; it runs in the front."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carries out one request."""
        messages: list[Message] = scope.pop(_SCOPE_KEY, [])
        is_complete = bool(messages) and not messages[-1].get("more_body", False)
        if is_complete and hasattr(receive, "_receive_asgi_messages"):
            # Called by the task that Ray Serve has made for this request, which first runs when the request waits.
            receive._receive_asgi_messages = _wait_forever

        async def receive_prefetched() -> Message:
            return messages.pop(0) if messages else await (_wait_forever() if is_complete else receive())

        await self._app(scope, receive_prefetched, send)


def prefetched_bytes(scope: Scope) -> int:
    """Bytes of a body that go with a request, and stay in the proxy until it is answered."""
    return sum(len(message.get("body", b"")) for message in scope.get(_SCOPE_KEY, ()))


async def _prefetch_body(receive: Receive) -> list[Message]:
    """The messages of a body until it is whole, or as many as are small and arrive at once."""
    messages: list[Message] = []
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_PREFETCH_TIMEOUT_S):
            while num_bytes < _PREFETCH_BYTES and (not messages or messages[-1].get("more_body", False)):
                messages.append(await receive())
                num_bytes += len(messages[-1].get("body", b""))
    return messages


async def _wait_forever(*_: object) -> Message:
    await asyncio.Event().wait()
    raise AssertionError
