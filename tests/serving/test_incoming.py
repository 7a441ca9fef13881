"""Small bodies go to the front with their request; nobody has to ask for them, and large ones are asked for."""

import asyncio

import pytest
from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from ray.serve._private.http_util import ASGIReceiveProxy
from starlette.requests import ClientDisconnect, Request

from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.http.body_prefetch import PrefetchBodyMiddleware, PrefetchedBodyMiddleware
from bsq_ray.serving.registry import ModelRegistry
from bsq_ray.serving.service_config import Limits

SCOPE = {"type": "http", "method": "POST", "headers": []}


class FakeBody:
    """What a client sends: parts, each with the seconds before it comes; then it waits for the answer."""

    def __init__(self, *parts):
        self.parts, self.num_receive_calls = list(parts), 0

    async def __call__(self):
        self.num_receive_calls += 1
        if not self.parts:
            await asyncio.Event().wait()
        seconds, part = self.parts[0]
        await asyncio.sleep(seconds)
        self.parts.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}


async def read_body_at_ingress(receive):
    """What the front reads, and how often it had to ask for it."""
    bodies, receive_counts = [], []

    async def api(scope, receive, send):
        bodies.append(await Request(scope, receive).body())

    async def ray_serve(scope, receive, send):
        """As Ray Serve: the scope is sent, `receive` goes back to the proxy."""
        before = client.asked
        await PrefetchedBodyMiddleware(api)(scope, receive, send)
        receive_counts.append(client.asked - before)

    client = receive
    await PrefetchBodyMiddleware(ray_serve)(dict(SCOPE), receive, None)
    return bodies[0], receive_counts[0]


@pytest.mark.parametrize("parts", [[b""], [b"whole"], [b"in ", b"two"], [bytes(2**16)] * 2])
def test_prefetch_small_body_needs_no_receive_call(parts):
    """A small body travels with its request, so the ingress does not request it."""
    assert asyncio.run(read_body_at_ingress(FakeBody(*((0, part) for part in parts)))) == (b"".join(parts), 0)


def test_prefetch_large_body_receives_the_rest():
    """The ingress requests only the rest of a large body."""
    parts = [bytes([number]) * 2**16 for number in range(7)]
    assert asyncio.run(read_body_at_ingress(FakeBody(*((0, part) for part in parts)))) == (b"".join(parts), 5)


def test_prefetch_removes_disconnect_disabled_header():
    """Of Ray Serve's headers the proxy reads those that are left."""
    forwarded_headers = []

    async def proxy(scope, receive, send):
        forwarded_headers.extend(scope["headers"])

    headers = [(b"x-request-disconnect-disabled", b"?1"), (b"host", b"x")]
    asyncio.run(PrefetchBodyMiddleware(proxy)(SCOPE | {"headers": headers}, FakeBody((0, b"")), None))
    assert forwarded_headers == [(b"host", b"x")]
    assert headers[0][0] == SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode()


def test_app_installs_prefetched_body_middleware():
    """The application reads the body that came with a request."""
    app = create_app(ModelRegistry([]), Limits(), None, True, None)
    assert [middleware.cls for middleware in app.user_middleware] == [PrefetchedBodyMiddleware]


def test_prefetch_slow_body_does_not_delay_request():
    """A slow body does not delay its request."""
    body = FakeBody((0, b"first "), (0.2, b"second "), (0, b"third"))
    assert asyncio.run(read_body_at_ingress(body)) == (b"first second third", 2)


def test_prefetch_disconnect_reaches_ingress():
    """A client that disconnects while sending is reported to the ingress."""
    with pytest.raises(ClientDisconnect):
        asyncio.run(read_body_at_ingress(FakeBody((0, b"first"), (0, None))))


@pytest.mark.parametrize(("parts", "asked"), [([b"whole"], 0), ([bytes(2**17), b"rest"], 1)])
def test_prefetch_ray_serve_requests_only_missing_body(parts, expected_calls):
    """Its own task asks over and over until the client is gone, whether or not anyone wants to know."""
    receive_calls = []

    async def receive_from_proxy(metadata):
        receive_calls.append(metadata)
        await asyncio.Event().wait()

    async def api(scope, receive, send):
        await receive()
        await asyncio.sleep(0.01)

    async def ingress(scope, receive, send):
        ray_receive = ASGIReceiveProxy(scope, "metadata", receive_from_proxy)
        task = asyncio.create_task(ray_receive.fetch_until_disconnect())
        await PrefetchedBodyMiddleware(api)(scope, ray_receive, send)
        task.cancel()

    asyncio.run(PrefetchBodyMiddleware(ingress)(dict(SCOPE), FakeBody(*((0, part) for part in parts)), None))
    assert len(receive_calls) == expected_calls


def test_prefetched_without_proxy_calls_receive():
    """Without the proxy middleware the ingress receives the whole body itself."""

    async def ingress():
        bodies = []

        async def api(scope, receive, send):
            bodies.append(await Request(scope, receive).body())

        await PrefetchedBodyMiddleware(api)(dict(SCOPE), FakeBody((0, b"in "), (0, b"two")), None)
        return bodies

    assert asyncio.run(ingress()) == [b"in two"]


def test_prefetch_non_http_scope_passes_through():
    """Scopes other than HTTP pass through unchanged."""
    scopes = []

    async def app(scope, receive, send):
        scopes.append(scope)

    asyncio.run(PrefetchBodyMiddleware(app)({"type": "lifespan"}, None, None))
    assert scopes == [{"type": "lifespan"}]
