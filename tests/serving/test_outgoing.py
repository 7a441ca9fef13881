"""Clients that read slowly, or not at all, hold bounded memory and harm nobody else."""

import asyncio

import pytest

from bsq_ray.serving.http.body_prefetch import Attaching
from bsq_ray.serving.http.response_backpressure import Outgoing, middlewares

SCOPE = {"type": "http", "method": "GET", "headers": []}


class Client:
    """Reads as many messages as it is told to, and then no more."""

    def __init__(self, reads=10**9):
        self.reads, self.seen = reads, []

    async def take(self, message):
        if len(self.seen) >= self.reads:
            await asyncio.Event().wait()
        self.seen.append(message)

    @property
    def status(self):
        return self.seen[0]["status"]

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.seen)


def sending(body):
    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def answering(*parts):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts) - 1})

    return app


def outgoing(app, megabytes=1.0, seconds=5.0):
    return Outgoing(app, megabytes, seconds)


def test_an_answer_arrives_as_it_is_in_pieces_of_which_only_the_last_one_ends_it():
    body = bytes(range(256)) * 1000
    client = Client()
    asyncio.run(outgoing(answering(body, b"", b"end"))(SCOPE, None, client.take))
    assert client.status == 200
    assert client.body == body + b"end"
    assert max(len(message.get("body", b"")) for message in client.seen) == 2**16
    assert [message["more_body"] for message in client.seen[1:]] == [True] * (len(client.seen) - 2) + [False]


def test_an_empty_answer_stays_one():
    client = Client()
    asyncio.run(outgoing(answering(b""))(SCOPE, None, client.take))
    assert [message["type"] for message in client.seen] == ["http.response.start", "http.response.body"]


def test_beyond_the_memory_for_answers_the_next_client_comes_again_later():
    async def together():
        service = outgoing(answering(bytes(600_000)))
        idle, refused, later = Client(reads=2), Client(), Client()
        reading = asyncio.create_task(service(SCOPE, None, idle.take))
        await asyncio.sleep(0.01)
        await service(SCOPE, None, refused.take)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await service(SCOPE, None, later.take)
        return refused, later

    refused, later = asyncio.run(together())
    assert refused.status == 429
    assert (b"retry-after", b"1") in refused.seen[0]["headers"]
    assert b"try again" in refused.body
    assert later.status == 200
    assert len(later.body) == 600_000


def test_the_body_that_came_with_a_request_counts_while_its_answer_is_read():
    async def together():
        parts = {"/large": answering(bytes(600_000)), "/small": answering(b"small")}
        of_path = outgoing(lambda scope, receive, send: parts[scope["path"]](scope, receive, send), megabytes=0.7)
        service = Attaching(of_path)
        idle, with_body, without = Client(reads=2), Client(), Client()
        reading = asyncio.create_task(service(SCOPE | {"path": "/large"}, sending(b""), idle.take))
        await asyncio.sleep(0.01)
        await service(SCOPE | {"path": "/small"}, sending(bytes(120_000)), with_body.take)
        await service(SCOPE | {"path": "/small"}, sending(b""), without.take)
        reading.cancel()
        return with_body.status, without.status

    assert asyncio.run(together()) == (429, 200)


def test_a_stream_breaks_off_where_there_is_no_room_for_what_comes():
    async def together():
        parts = {"/whole": answering(bytes(600_000)), "/stream": answering(b"first line", bytes(600_000), b"last")}
        service = outgoing(lambda scope, receive, send: parts[scope["path"]](scope, receive, send))
        idle, stream = Client(reads=2), Client()
        reading = asyncio.create_task(service(SCOPE | {"path": "/whole"}, None, idle.take))
        await asyncio.sleep(0.01)
        await service(SCOPE | {"path": "/stream"}, None, stream.take)
        reading.cancel()
        return stream

    stream = asyncio.run(together())
    assert stream.status == 200
    assert stream.body == b"first line"
    assert stream.seen[-1]["more_body"]


def test_a_single_answer_may_be_larger_than_the_memory_for_all():
    client = Client()
    asyncio.run(outgoing(answering(bytes(3_000_000)))(SCOPE, None, client.take))
    assert len(client.body) == 3_000_000
    assert [message["more_body"] for message in client.seen[1:]] == [True] * (len(client.seen) - 2) + [False]


@pytest.mark.parametrize("reads", [0, 3])
def test_who_does_not_read_is_cut_off_and_holds_nothing_any_more(reads):
    """Not even the head of the answer, where the connection is still full of the one before."""

    async def in_turn():
        service = outgoing(answering(bytes(600_000), b"more"), seconds=0.05)
        idle, next_one = Client(reads), Client()
        await service(SCOPE, None, idle.take)
        await service(SCOPE, None, next_one.take)
        return idle, next_one

    idle, next_one = asyncio.run(in_turn())
    assert len(idle.body) == max(0, reads - 1) * 2**16
    assert next_one.status == 200
    assert len(next_one.body) == 600_004


def test_what_is_no_request_passes():
    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    client = Client()
    asyncio.run(outgoing(app)({"type": "lifespan"}, None, client.take))
    assert client.seen == [{"type": "lifespan.startup.complete"}]


def test_the_environment_says_how_much(monkeypatch):
    monkeypatch.setenv("BSQ_RAY_ANSWERS_MB", "7.5")
    assert [middleware.cls for middleware in middlewares()] == [Outgoing, Attaching]
    assert middlewares()[0].kwargs == {"answers_mb": 7.5}
    for text in ("much", "nan", "-1"):
        monkeypatch.setenv("BSQ_RAY_ANSWERS_MB", text)
        with pytest.raises(ValueError, match=f"BSQ_RAY_ANSWERS_MB={text}: give a number of MB above 0"):
            middlewares()
