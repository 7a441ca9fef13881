"""Body prefetch: small bodies travel with their request, and the ingress requests the rest of large ones."""

import asyncio

import pytest
from ray.serve._private.http_util import ASGIReceiveProxy
from starlette.requests import ClientDisconnect, Request

from bsq_ray.runtime._ray_internals import disconnect_disabled_header
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.http.body_prefetch import PrefetchBodyMiddleware, PrefetchedBodyMiddleware
from bsq_ray.serving.registry import ModelRegistry
from bsq_ray.serving.service_config import Limits

SCOPE = {"type": "http", "method": "POST", "headers": []}


class FakeBody:
    """The body of a client: parts, each with a delay in seconds; then the client waits for the response."""

    def __init__(self, *parts):
        self.parts, self.num_receive_calls = list(parts), 0

    async def __call__(self):
        self.num_receive_calls += 1
        if not self.parts:
            await asyncio.Event().wait()
        delay_s, part = self.parts[0]
        await asyncio.sleep(delay_s)
        self.parts.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}


async def read_body_at_ingress(receive):
    """Return the body that the ingress reads, and its number of receive calls."""
    bodies, receive_counts = [], []

    async def api(scope, receive, send):
        bodies.append(await Request(scope, receive).body())

    async def ray_serve(scope, receive, send):
        """Act as Ray Serve: the scope travels to the ingress, `receive` calls the proxy."""
        before = client.num_receive_calls
        await PrefetchedBodyMiddleware(api)(scope, receive, send)
        receive_counts.append(client.num_receive_calls - before)

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
    """The header that would keep a request running after a disconnect is removed."""
    forwarded_headers = []

    async def proxy(scope, receive, send):
        forwarded_headers.extend(scope["headers"])

    headers = [(disconnect_disabled_header(), b"?1"), (b"host", b"x")]
    asyncio.run(PrefetchBodyMiddleware(proxy)(SCOPE | {"headers": headers}, FakeBody((0, b"")), None))
    assert forwarded_headers == [(b"host", b"x")]


@pytest.mark.parametrize("prefetch_bodies", [True, False])
def test_app_installs_prefetched_body_middleware(prefetch_bodies):
    """The application reads prefetched bodies in any case; the setting only decides about the calls to the proxy."""
    app = create_app(
        ModelRegistry([]), Limits(), token_hash=None, loopback_only=True, collect_metrics=None,
        prefetch_bodies=prefetch_bodies,
    )  # fmt: skip
    [middleware] = [each for each in app.user_middleware if each.cls is PrefetchedBodyMiddleware]
    assert middleware.kwargs == {"skip_receive": prefetch_bodies}


def test_prefetched_body_without_skip_calls_receive():
    """With the setting off, Ray's receive object stays as it is, and a disconnect comes from it."""

    async def receive():
        return {"type": "http.disconnect"}

    async def api(scope, receive, send):
        received.extend([await receive(), await receive()])

    received = []
    scope = SCOPE | {"bsq_ray.prefetched_messages": [{"type": "http.request", "body": b"whole"}]}
    asyncio.run(PrefetchedBodyMiddleware(api, skip_receive=False)(scope, receive, None))
    assert [message["type"] for message in received] == ["http.request", "http.disconnect"]


def test_prefetch_slow_body_does_not_delay_request():
    """A slow body does not delay its request."""
    body = FakeBody((0, b"first "), (0.2, b"second "), (0, b"third"))
    assert asyncio.run(read_body_at_ingress(body)) == (b"first second third", 2)


def test_prefetch_disconnect_reaches_ingress():
    """A client that disconnects while sending is reported to the ingress."""
    with pytest.raises(ClientDisconnect):
        asyncio.run(read_body_at_ingress(FakeBody((0, b"first"), (0, None))))


@pytest.mark.parametrize(("parts", "expected_calls"), [([b"whole"], 0), ([bytes(2**17), b"rest"], 1)])
def test_prefetch_ray_serve_requests_only_missing_body(parts, expected_calls):
    """Ray Serve's own task requests messages from the proxy only if the body is incomplete."""
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
