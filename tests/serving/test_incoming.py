"""Small bodies go to the front with their request; nobody has to ask for them, and large ones are asked for."""

import asyncio

import pytest
from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from ray.serve._private.http_util import ASGIReceiveProxy
from starlette.requests import ClientDisconnect, Request

from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.http.body_prefetch import Attached, Attaching
from bsq_ray.serving.registry import Models
from bsq_ray.serving.service_config import Limits

SCOPE = {"type": "http", "method": "POST", "headers": []}


class Body:
    """What a client sends: parts, each with the seconds before it comes; then it waits for the answer."""

    def __init__(self, *parts):
        self.parts, self.asked = list(parts), 0

    async def __call__(self):
        self.asked += 1
        if not self.parts:
            await asyncio.Event().wait()
        seconds, part = self.parts[0]
        await asyncio.sleep(seconds)
        self.parts.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(self.parts)}


async def body_at_front(receive):
    """What the front reads, and how often it had to ask for it."""
    bodies, asked = [], []

    async def api(scope, receive, send):
        bodies.append(await Request(scope, receive).body())

    async def between(scope, receive, send):
        """As Ray Serve: the scope is sent, `receive` goes back to the proxy."""
        before = client.asked
        await Attached(api)(scope, receive, send)
        asked.append(client.asked - before)

    client = receive
    await Attaching(between)(dict(SCOPE), receive, None)
    return bodies[0], asked[0]


@pytest.mark.parametrize("parts", [[b""], [b"whole"], [b"in ", b"two"], [bytes(2**16)] * 2])
def test_a_small_body_comes_with_its_request(parts):
    assert asyncio.run(body_at_front(Body(*((0, part) for part in parts)))) == (b"".join(parts), 0)


def test_of_a_large_body_the_front_asks_for_the_rest():
    parts = [bytes([number]) * 2**16 for number in range(7)]
    assert asyncio.run(body_at_front(Body(*((0, part) for part in parts)))) == (b"".join(parts), 5)


def test_no_client_can_have_its_request_go_on_without_it():
    """Of Ray Serve's headers the proxy reads those that are left."""
    seen = []

    async def proxy(scope, receive, send):
        seen.extend(scope["headers"])

    headers = [(b"x-request-disconnect-disabled", b"?1"), (b"host", b"x")]
    asyncio.run(Attaching(proxy)(SCOPE | {"headers": headers}, Body((0, b"")), None))
    assert seen == [(b"host", b"x")]
    assert headers[0][0] == SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode()


def test_the_front_takes_what_came_with_a_request():
    app = create_app(Models([]), Limits(), None, True, None)
    assert [middleware.cls for middleware in app.user_middleware] == [Attached]


def test_a_slow_body_does_not_hold_its_request_back():
    body = Body((0, b"first "), (0.2, b"second "), (0, b"third"))
    assert asyncio.run(body_at_front(body)) == (b"first second third", 2)


def test_who_goes_away_while_sending_is_gone_at_the_front_too():
    with pytest.raises(ClientDisconnect):
        asyncio.run(body_at_front(Body((0, b"first"), (0, None))))


@pytest.mark.parametrize(("parts", "asked"), [([b"whole"], 0), ([bytes(2**17), b"rest"], 1)])
def test_ray_serve_asks_the_proxy_only_for_what_is_missing(parts, asked):
    """Its own task asks over and over until the client is gone, whether or not anyone wants to know."""
    asking = []

    async def of_proxy(metadata):
        asking.append(metadata)
        await asyncio.Event().wait()

    async def api(scope, receive, send):
        await receive()
        await asyncio.sleep(0.01)

    async def front(scope, receive, send):
        of_ray = ASGIReceiveProxy(scope, "metadata", of_proxy)
        task = asyncio.create_task(of_ray.fetch_until_disconnect())
        await Attached(api)(scope, of_ray, send)
        task.cancel()

    asyncio.run(Attaching(front)(dict(SCOPE), Body(*((0, part) for part in parts)), None))
    assert len(asking) == asked


def test_without_the_proxys_part_the_front_asks():
    async def front():
        bodies = []

        async def api(scope, receive, send):
            bodies.append(await Request(scope, receive).body())

        await Attached(api)(dict(SCOPE), Body((0, b"in "), (0, b"two")), None)
        return bodies

    assert asyncio.run(front()) == [b"in two"]


def test_what_is_no_request_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    asyncio.run(Attaching(app)({"type": "lifespan"}, None, None))
    assert seen == [{"type": "lifespan"}]
