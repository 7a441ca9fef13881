"""Limits of the HTTP API, authentication, and responses while models load or fail."""

import asyncio

import pytest
from local_service import encode_image, make_app, save_models, wait_until_loaded
from starlette.testclient import TestClient

from bsq_ray.serving.http.admission import hash_token
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.registry import ModelKind, ModelRegistry, ServedModel
from bsq_ray.serving.service_config import Limits, Settings

TOKEN = "a-token-of-enough-length"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    limits = Limits(max_body_mb=0.5, upload_timeout_s=1, request_timeout_s=60, max_ongoing_requests=4)
    return Settings(models=save_models(tmp_path_factory.mktemp("models")), limits=limits, authentication=False)


def test_body_over_limit_returns_413(client):
    """A body over the limit is rejected before it is read completely."""
    read = []

    def endless():
        while len(read) < 1000:
            read.append(1)
            yield bytes(100_000)

    response = client.post("/v1/encode", content=endless())
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert client.post("/v1/encode", content=bytes(600_000)).status_code == 413


async def send_asgi_request(app, path="/v1/encode", body=(), delay=0.0):
    """Send a request at the level of ASGI, in parts with a delay before each; return status and headers."""
    parts, sent = list(body), []

    async def receive():
        await asyncio.sleep(delay)
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1",
        "headers": [(b"host", b"localhost")], "scheme": "http", "server": ("test", 80), "client": ("test", 1),
        "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"])


def test_slow_body_returns_408_without_taking_a_slot(settings, replicas, photo):
    """A slow upload times out with 408 and does not occupy a request slot."""
    app = make_app(settings, replicas)

    async def check():
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.3)
            slow = [asyncio.create_task(send_asgi_request(app, body=[b"x"] * 100, delay=0.3)) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert (await send_asgi_request(app, body=[encode_image(photo)]))[0] == 200
            assert {status for status, _ in await asyncio.gather(*slow)} == {408}

    asyncio.run(check())


def test_requests_over_limit_return_429(settings, replicas, photo):
    """With a limit of four, twelve concurrent requests give four results and eight times 429."""
    app = make_app(settings, replicas)

    async def check():
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.3)
            body = encode_image(photo)
            responses = await asyncio.gather(*(send_asgi_request(app, body=[body]) for _ in range(12)))
            counts = [status for status, _ in responses]
            assert counts.count(200) == 4
            assert counts.count(429) == 8
            assert all(headers[b"retry-after"] == b"1" for status, headers in responses if status == 429)
            assert (await send_asgi_request(app, body=[body]))[0] == 200

    asyncio.run(check())


def app_with_replicas(replicas, limits):
    """Return the application, not restricted to loopback, with one tokenizer with these replicas."""
    models = ModelRegistry([ServedModel("small", ModelKind("tokenizer", 1), {"tokenizer": replicas})])
    return create_app(models, limits, token_hash=None, loopback_only=False, collect_metrics=lambda: "")


def test_request_before_models_load_returns_503(settings, photo):
    """Requests return 503 until the models are loaded."""
    loaded = asyncio.Event()

    class Loading:
        async def call(self, method, *arguments):
            await loaded.wait()
            return {}

    with TestClient(app_with_replicas(Loading(), settings.limits)) as client:
        health = client.get("/healthz")
        assert health.status_code == 503
        assert health.json() == {"status": "loading", "models": ["small"]}
        for path in ("encode", "reconstruct"):
            response = client.post(f"/v1/{path}", content=encode_image(photo))
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0


def test_request_over_timeout_returns_503(settings, photo):
    """A request that exceeds its timeout returns 503."""

    class Stuck:
        async def call(self, method, *arguments):
            if method == "metadata":
                return {"bits": 10}
            return await asyncio.Event().wait()

    limits = settings.limits.model_copy(update={"request_timeout_s": 0.2})
    with TestClient(app_with_replicas(Stuck(), limits)) as client:
        wait_until_loaded(client)
        response = client.post("/v1/encode", content=encode_image(photo))
        assert response.status_code == 503
        assert "longer than 0.2 s" in response.json()["error"]


def test_internal_error_hides_details(settings, photo):
    """An internal error returns 500 without details of the failure."""

    class Broken:
        async def call(self, method, *arguments):
            if method == "metadata":
                return {"bits": 10}
            raise RuntimeError("/secret/path/model.py broke")

    with TestClient(app_with_replicas(Broken(), settings.limits), raise_server_exceptions=False) as client:
        wait_until_loaded(client)
        response = client.post("/v1/encode", content=encode_image(photo))
        assert response.status_code == 500
        assert response.json() == {"error": "internal error; see the log of the service"}


def test_model_load_failure_is_retried(settings, monkeypatch, caplog):
    """Loading a model is retried after a failure."""
    monkeypatch.setattr("bsq_ray.serving.http.api._LOAD_RETRY_DELAY_S", 0.01)

    class Late:
        failures = 2

        async def call(self, method, *arguments):
            if self.failures:
                self.failures -= 1
                raise RuntimeError("not enough memory for the model")
            return {"bits": 10}

    with TestClient(app_with_replicas(Late(), settings.limits)) as client:
        wait_until_loaded(client)
    assert caplog.text.count("the model small cannot be loaded; retrying") == 2


def test_authentication_leaves_page_and_health_public(settings, replicas, photo):
    """With authentication, only the page and the health check are public."""
    with TestClient(make_app(settings, replicas, hash_token(TOKEN))) as client:
        wait_until_loaded(client)
        for path in ("/", "/docs", "/openapi.json", "/page/script.js", "/page/style.css", "/healthz"):
            assert client.get(path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            for path in ("/v1/models", "/metrics"):
                response = client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
            for path in ("encode", "decode", "reconstruct", "compress", "decompress", "measure", "generate"):
                assert client.post(f"/v1/{path}", content=b"x" * 10_000_000, headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.post("/v1/encode", content=encode_image(photo), headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.0.1:80", "[::1]", "[::1]:8000")),
        *(
            (host, 200)
            for host in ("localhost.", "Localhost.:80", "127.1", "127.0.0.1.", "[::ffff:127.0.0.1]", "a.localhost:1")
        ),
        *(
            (host, 403)
            for host in ("attacker.example:8000", "localhost.attacker.example", "127.0.0.1.attacker.example")
        ),
        *(
            (host, 403)
            for host in (
                "192.168.1.5:8000",
                "attacker@example",
                "[::1",
                "[::2]",
                "",
                ".",
                "10.1",
                "localhost..",
                "xlocalhost",
            )
        ),
    ],
)
def test_no_token_foreign_host_header_returns_403(client, photo, host, status):
    """Without a token, requests whose Host header is not loopback are rejected, which prevents DNS rebinding."""
    paths = {path: client.get(path, headers={"Host": host}) for path in ("/v1/models", "/metrics")}
    paths["/v1/encode"] = client.post("/v1/encode", content=encode_image(photo), headers={"Host": host})
    assert {path: response.status_code for path, response in paths.items()} == dict.fromkeys(paths, status)
    if status == 403:
        assert all("requests to localhost" in response.json()["error"] for response in paths.values())
