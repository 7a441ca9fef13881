"""Body prefetch: Ray Serve's proxy sends a small request body to the ingress together with the request.

    client ─▶ proxy: PrefetchBodyMiddleware ─request and small body─▶ ingress: PrefetchedBodyMiddleware ─▶ api.py
                                             └─ a large or slow body: the part that has arrived; the ingress requests
                                                the rest from the proxy

Without it, the ingress calls the proxy twice per request: once for the body, and once to wait for a disconnect. The
proxy cancels the request of a disconnected client anyway. Both calls together cost about 3 ms per request on a CPU, so
`ingress.prefetch_bodies` is on by default.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bsq_ray.runtime._ray_internals import disconnect_disabled_header, replace_receive_source

# A larger body is not prefetched any further; the proxy receives up to 256 KB more at a time.
_PREFETCH_BYTES = 2**17
# Time for a small body to arrive. The ingress limits the time for the rest.
_PREFETCH_TIMEOUT_S = 0.05
# Key of the ASGI scope under which the proxy sends the messages to the ingress.
_SCOPE_KEY = "bsq_ray.prefetched_messages"


class PrefetchBodyMiddleware:
    """Adds the part of the body that has arrived to the ASGI scope; runs in the proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            # With this header the proxy would not cancel the request of a disconnected client.
            scope["headers"] = [header for header in scope["headers"] if header[0] != disconnect_disabled_header()]
            scope[_SCOPE_KEY] = await _prefetch_body(receive)
        await self._app(scope, receive, send)


class PrefetchedBodyMiddleware:
    """Delivers the prefetched part of the body before the rest; runs in the ingress.

    Args:
        skip_receive: do not request anything from the proxy when the whole body was prefetched.
    """

    def __init__(self, app: ASGIApp, skip_receive: bool = True) -> None:
        self._app, self._skip_receive = app, skip_receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        messages: list[Message] = scope.pop(_SCOPE_KEY, [])
        is_complete = bool(messages) and not messages[-1].get("more_body", False)
        is_receive_skipped = is_complete and self._skip_receive
        if is_receive_skipped:
            # Ray Serve's task for this request has not yet run; it would request messages until a disconnect.
            replace_receive_source(receive, _wait_forever)

        async def receive_prefetched() -> Message:
            if messages:
                return messages.pop(0)
            return await (_wait_forever() if is_receive_skipped else receive())

        await self._app(scope, receive_prefetched, send)


def prefetched_bytes(scope: Scope) -> int:
    """Return the bytes of a prefetched body, which stay in the proxy until the response is sent."""
    return sum(len(message.get("body", b"")) for message in scope.get(_SCOPE_KEY, ()))


async def _prefetch_body(receive: Receive) -> list[Message]:
    """Receive messages until the body is complete, too large or too slow."""
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
    raise AssertionError("unreachable")
