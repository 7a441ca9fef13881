"""Clients that read slowly, or not at all, hold bounded memory and harm nobody else."""

import asyncio

import pytest

from bsq_ray.serving.http.body_prefetch import PrefetchBodyMiddleware
from bsq_ray.serving.http.response_backpressure import ResponseBackpressureMiddleware, middlewares

SCOPE = {"type": "http", "method": "GET", "headers": []}


class FakeClient:
    """Reads as many messages as it is told to, and then no more."""

    def __init__(self, reads=10**9):
        self.max_messages, self.messages = reads, []

    async def send(self, message):
        if len(self.messages) >= self.max_messages:
            await asyncio.Event().wait()
        self.messages.append(message)

    @property
    def status(self):
        return self.messages[0]["status"]

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages)


def receive_body(body):
    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def app_with_body(*parts):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts) - 1})

    return app


def with_backpressure(app, megabytes=1.0, timeout_s=5.0):
    return ResponseBackpressureMiddleware(app, megabytes, timeout_s)


def test_backpressure_splits_response_into_chunks():
    """A response arrives unchanged in chunks, and only the last chunk ends it."""
    body = bytes(range(256)) * 1000
    client = FakeClient()
    asyncio.run(with_backpressure(app_with_body(body, b"", b"end"))(SCOPE, None, client.take))
    assert client.status == 200
    assert client.body == body + b"end"
    assert max(len(message.get("body", b"")) for message in client.seen) == 2**16
    assert [message["more_body"] for message in client.seen[1:]] == [True] * (len(client.seen) - 2) + [False]


def test_backpressure_keeps_empty_response():
    """An empty response stays a single empty message."""
    client = FakeClient()
    asyncio.run(with_backpressure(app_with_body(b""))(SCOPE, None, client.take))
    assert [message["type"] for message in client.seen] == ["http.response.start", "http.response.body"]


def test_backpressure_over_memory_limit_returns_429():
    """When response memory is exhausted, the next client receives 429 and can retry later."""

    async def together():
        service = with_backpressure(app_with_body(bytes(600_000)))
        idle, rejected, later = FakeClient(reads=2), FakeClient(), FakeClient()
        reading = asyncio.create_task(service(SCOPE, None, idle.take))
        await asyncio.sleep(0.01)
        await service(SCOPE, None, rejected.take)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await service(SCOPE, None, later.take)
        return rejected, later

    refused, later = asyncio.run(together())
    assert refused.status == 429
    assert (b"retry-after", b"1") in refused.seen[0]["headers"]
    assert b"try again" in refused.body
    assert later.status == 200
    assert len(later.body) == 600_000


def test_backpressure_counts_prefetched_body():
    """The prefetched body of a request counts toward the memory limit while its response is read."""

    async def together():
        parts = {"/large": app_with_body(bytes(600_000)), "/small": app_with_body(b"small")}
        route_by_path = with_backpressure(
            lambda scope, receive, send: parts[scope["path"]](scope, receive, send), megabytes=0.7
        )
        service = PrefetchBodyMiddleware(route_by_path)
        idle, with_body, without = FakeClient(reads=2), FakeClient(), FakeClient()
        reading = asyncio.create_task(service(SCOPE | {"path": "/large"}, receive_body(b""), idle.take))
        await asyncio.sleep(0.01)
        await service(SCOPE | {"path": "/small"}, receive_body(bytes(120_000)), with_body.take)
        await service(SCOPE | {"path": "/small"}, receive_body(b""), without.take)
        reading.cancel()
        return with_body.status, without.status

    assert asyncio.run(together()) == (429, 200)


def test_backpressure_ends_stream_over_memory_limit():
    """A stream ends where its next part exceeds the memory limit."""

    async def together():
        parts = {
            "/whole": app_with_body(bytes(600_000)),
            "/stream": app_with_body(b"first line", bytes(600_000), b"last"),
        }
        service = with_backpressure(lambda scope, receive, send: parts[scope["path"]](scope, receive, send))
        idle, stream = FakeClient(reads=2), FakeClient()
        reading = asyncio.create_task(service(SCOPE | {"path": "/whole"}, None, idle.take))
        await asyncio.sleep(0.01)
        await service(SCOPE | {"path": "/stream"}, None, stream.take)
        reading.cancel()
        return stream

    stream = asyncio.run(together())
    assert stream.status == 200
    assert stream.body == b"first line"
    assert stream.seen[-1]["more_body"]


def test_backpressure_allows_one_oversized_response():
    """A single response may be larger than the memory limit for all responses."""
    client = FakeClient()
    asyncio.run(with_backpressure(app_with_body(bytes(3_000_000)))(SCOPE, None, client.take))
    assert len(client.body) == 3_000_000
    assert [message["more_body"] for message in client.seen[1:]] == [True] * (len(client.seen) - 2) + [False]


@pytest.mark.parametrize("reads", [0, 3])
def test_backpressure_drops_client_that_does_not_read(max_messages):
    """Not even the head of the answer, where the connection is still full of the one before."""

    async def in_turn():
        service = with_backpressure(app_with_body(bytes(600_000), b"more"), seconds=0.05)
        idle, next_one = FakeClient(max_messages), FakeClient()
        await service(SCOPE, None, idle.take)
        await service(SCOPE, None, next_one.take)
        return idle, next_one

    idle, next_one = asyncio.run(in_turn())
    assert len(idle.body) == max(0, max_messages - 1) * 2**16
    assert next_one.status == 200
    assert len(next_one.body) == 600_004


def test_backpressure_non_http_scope_passes_through():
    """Scopes other than HTTP pass through unchanged."""

    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    client = FakeClient()
    asyncio.run(with_backpressure(app)({"type": "lifespan"}, None, client.take))
    assert client.seen == [{"type": "lifespan.startup.complete"}]


def test_middlewares_read_limit_from_environment(monkeypatch):
    """The memory limit comes from the environment, and invalid values raise ValueError."""
    monkeypatch.setenv("BSQ_RAY_ANSWERS_MB", "7.5")
    assert [middleware.cls for middleware in middlewares()] == [ResponseBackpressureMiddleware, PrefetchBodyMiddleware]
    assert middlewares()[0].kwargs == {"answers_mb": 7.5}
    for text in ("much", "nan", "-1"):
        monkeypatch.setenv("BSQ_RAY_ANSWERS_MB", text)
        with pytest.raises(ValueError, match=f"BSQ_RAY_ANSWERS_MB={text}: give a number of MB above 0"):
            middlewares()
