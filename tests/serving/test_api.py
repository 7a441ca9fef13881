"""The HTTP interface: formats in and out, and a plain refusal for everything that cannot be done."""

import asyncio
import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from local_service import make_app, save_models, wait_until_loaded
from PIL import Image
from starlette.testclient import TestClient

from bsq_ray import Codec, Generator, Tokenizer
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.serving.http.admission import digest
from bsq_ray.serving.http.api import create_app
from bsq_ray.serving.registry import Kind, Model, Models
from bsq_ray.serving.service_config import Limits, Settings

TOKEN = "a-token-of-enough-length"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    limits = Limits(body_mb=0.5, pixels=300_000, upload_seconds=1, seconds=60, waiting=4)
    return Settings(models=save_models(tmp_path_factory.mktemp("models")), limits=limits, authentication=False)


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((160, 120))


def file_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(answer):
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def test_the_models_and_what_they_offer_are_listed(client, settings):
    listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert listed["small"]["offers"] == ["encode", "decode", "reconstruct", "compress", "decompress", "measure"]
    assert listed["prior"]["offers"] == ["compress", "decompress", "measure"]
    assert listed["draws"]["offers"] == ["generate"]
    assert listed["small"]["tokenizer_id"] == Tokenizer.from_pretrained(settings.models["small"]).model_id
    assert listed["draws"]["classes"] == 4


def test_tokens_and_pixels_are_those_of_the_library(client, settings, photo):
    tokenizer = Tokenizer.from_pretrained(settings.models["small"])
    original = to_float(torch.from_numpy(eval_transform(photo, 64, "lanczos"))[None])
    tokens = tokenizer.encode(original)
    answer = client.post("/v1/encode", content=file_of(photo)).json()
    assert (answer["model"], answer["grid"], answer["bits"]) == ("small", [1, 8, 8], 10)
    packed = np.frombuffer(base64.b64decode(answer["packed"]), np.uint8).reshape(64, 2)
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, :10]
    assert np.array_equal(bits, tokens.bits_BNL[0].numpy())
    shown = np.asarray(opened(client.post("/v1/decode", json=answer)))
    [expected] = to_uint8(tokenizer.decode(tokens))
    assert np.array_equal(shown.transpose(2, 0, 1), expected.numpy())
    both = client.post("/v1/reconstruct", content=file_of(photo))
    assert np.array_equal(np.asarray(opened(both)), shown)
    assert both.headers["x-bits-per-pixel"] == "0.15625"
    assert 5 < float(both.headers["x-psnr"]) < 40


@pytest.mark.parametrize("name", ["small", "prior"])
def test_a_bsq_file_is_the_librarys_and_finds_its_model(client, settings, photo, name):
    answer = client.post("/v1/compress", params={"model": name}, content=file_of(photo))
    codec = Codec.from_pretrained(settings.models[name])
    assert answer.content == codec.compress(photo).data
    assert answer.headers["x-bits-per-pixel"] == f"{8 * len(answer.content) / (160 * 120):.6g}"
    back = client.post("/v1/decompress", content=answer.content)
    assert back.headers["x-model"] == name
    assert np.array_equal(np.asarray(opened(back)), np.asarray(codec.decompress(answer.content)))


def test_figures_and_sizes_of_standard_files_are_measured(client, photo):
    figures = client.post("/v1/measure", content=file_of(photo)).json()
    assert figures["bits_per_pixel"] == pytest.approx(8 * figures["bytes"] / (160 * 120))
    assert figures["lpips"] > 0
    for metric in ("psnr", "lpips"):
        for codec in ("JPEG", "WebP"):
            standard = figures["equal"][metric][codec]
            assert len(standard_codecs()[codec].encode(photo, standard["quality"])) == standard["bytes"]


def test_an_image_is_generated_step_by_step(client, settings):
    answer = client.post("/v1/generate", json={"class": 2, "seed": 5, "steps": 4, "guidance": 1.5})
    assert answer.headers["content-type"] == "application/x-ndjson"
    steps = [json.loads(line) for line in answer.text.splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["steps"] == 4 and step["seed"] == 5 for step in steps)
    pictures = [Image.open(io.BytesIO(base64.b64decode(step["image"].split(",")[1]))) for step in steps]
    grey = [(np.asarray(picture) == 128).all(-1).mean() for picture in pictures]
    assert grey[0] > grey[1] > grey[2]
    [expected] = to_uint8(Generator.from_pretrained(settings.models["draws"]).generate([2], 5, steps=4, guidance=1.5))
    assert np.array_equal(np.asarray(pictures[-1]).transpose(2, 0, 1), expected.numpy())
    only = client.post("/v1/generate", json={"class": 2, "seed": 5, "steps": 4, "guidance": 1.5}, headers=PNG)
    assert np.array_equal(np.asarray(opened(only)), np.asarray(pictures[-1]))
    assert client.post("/v1/generate", json={"class": 0, "steps": 1}, headers=PNG).headers["x-seed"]


PNG = {"Accept": "image/png"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_come_in_the_formats_people_have(client, photo, kind):
    for headers in ({}, {"Content-Type": "application/octet-stream"}, {"Content-Type": f"image/{kind.lower()}"}):
        assert client.post("/v1/encode", content=file_of(photo, kind), headers=headers).status_code == 200


def test_a_bomb_is_refused_from_its_header(client):
    """A PNG that claims 100,000 x 100,000 pixels, 30 GB when decoded."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (1000, 12_000, 100_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
        for path in ("encode", "reconstruct", "compress", "measure"):
            answer = client.post(f"/v1/{path}", content=bomb)
            assert answer.status_code == 413
            assert "300000" in answer.json()["error"]


def claims(file, width):
    """A .bsq file whose header says another width."""
    return file[:8] + struct.pack("<I", width) + file[12:]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("encode", b"", 422, "empty"),
        ("encode", b"no image", 415, "not an image or video"),
        ("encode", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not an image or video"),
        ("compress", lambda photo, _: file_of(photo)[:3000], 422, "damaged"),
        ("encode?model=other", lambda photo, _: file_of(photo), 404, "no model other"),
        ("encode?model=draws", lambda photo, _: file_of(photo), 422, "draws does not encode"),
        ("decompress", b"no file", 415, "not a .bsq file"),
        ("decompress", lambda _, file: file[:60], 422, "cut off"),
        ("decompress", lambda _, file: file[:-1] + bytes([file[-1] ^ 1]), 422, "checksum"),
        ("decompress", lambda _, file: claims(file, 2**31), 422, "claims"),
        ("decompress", lambda _, file: file[:21] + bytes(8) + file[29:], 422, "not served here"),
        ("decode", b"[1, 2", 415, "not JSON"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 10}', 422, "packed"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 9, "packed": ""}', 422, "bits"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 10, "packed": "%%"}', 422, "base64"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 10, "packed": "AAAA"}', 422, "64 tokens of 2 bytes"),
        ("decode", b'{"grid": [8, 8], "bits": 10, "packed": "AAAA"}', 422, "grid"),
        ("generate", b'{"class": 7}', 422, "classes 0 to 3"),
        ("generate", b'{"class": 99999999999999999999999}', 422, "class"),
        ("generate", b'{"class": 0, "steps": 0}', 422, "steps"),
        ("generate", b'{"class": 0, "steps": 5000}', 422, "at most 256"),
        ("generate", b'{"class": 0, "guidance": "much"}', 422, "guidance"),
        ("generate", b'{"class": 0, "size": 3}', 422, "size"),
        ("generate", b'{"class": 0, "model": "small"}', 422, "small does not generate"),
        ("nothing", b"", 404, "not found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_in_a_sentence(client, photo, path, body, status, said):
    if callable(body):
        body = body(photo, client.post("/v1/compress", content=file_of(photo)).content)
    answer = client.post(f"/v1/{path}", content=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]
    assert "Traceback" not in answer.text
    assert "/" not in answer.json()["error"].replace("application/", "")


def test_a_form_is_told_how_to_send_the_file(client, photo):
    answer = client.post("/v1/encode", files={"file": file_of(photo)})
    assert answer.status_code == 415
    assert "--data-binary" in answer.json()["error"]


def test_a_body_is_cut_off_where_it_is_too_large(client):
    read = []

    def endless():
        while len(read) < 1000:
            read.append(1)
            yield bytes(100_000)

    answer = client.post("/v1/encode", content=endless())
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert client.post("/v1/encode", content=bytes(600_000)).status_code == 413


async def ask(app, path="/v1/encode", body=(), delay=0.0):
    """A request at the level of ASGI, whose parts come one by one; without more of them it waits."""
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


def test_a_slow_body_ends_with_408_and_takes_no_ones_turn(settings, replicas, photo):
    app = make_app(settings, replicas)

    async def check():
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.3)
            slow = [asyncio.create_task(ask(app, body=[b"x"] * 100, delay=0.3)) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert (await ask(app, body=[file_of(photo)]))[0] == 200
            assert {status for status, _ in await asyncio.gather(*slow)} == {408}

    asyncio.run(check())


def test_beyond_the_limit_requests_are_told_to_come_again(settings, replicas, photo):
    """Four requests may be under way; the others hear so at once, and the four are answered."""
    app = make_app(settings, replicas)

    async def check():
        async with app.router.lifespan_context(app):
            await asyncio.sleep(0.3)
            body = file_of(photo)
            answers = await asyncio.gather(*(ask(app, body=[body]) for _ in range(12)))
            counts = [status for status, _ in answers]
            assert counts.count(200) == 4
            assert counts.count(429) == 8
            assert all(headers[b"retry-after"] == b"1" for status, headers in answers if status == 429)
            assert (await ask(app, body=[body]))[0] == 200

    asyncio.run(check())


def app_of(replicas, limits):
    """The application, open to all machines, with one tokenizer whose replicas behave badly."""
    models = Models([Model("small", Kind("tokenizer", 1), {"tokenizer": replicas})])
    return create_app(models, limits, None, False, lambda: "")


def test_before_the_models_are_loaded_the_answer_is_503(settings, photo):
    loaded = asyncio.Event()

    class Loading:
        async def call(self, method, *arguments):
            await loaded.wait()
            return {}

    with TestClient(app_of(Loading(), settings.limits)) as client:
        health = client.get("/healthz")
        assert health.status_code == 503
        assert health.json() == {"status": "loading", "models": ["small"]}
        for path in ("encode", "reconstruct"):
            answer = client.post(f"/v1/{path}", content=file_of(photo))
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0


def test_an_answer_that_takes_too_long_ends(settings, photo):
    class Stuck:
        async def call(self, method, *arguments):
            if method == "facts":
                return {"bits": 10}
            return await asyncio.Event().wait()

    limits = settings.limits.model_copy(update={"seconds": 0.2})
    with TestClient(app_of(Stuck(), limits)) as client:
        wait_until_loaded(client)
        answer = client.post("/v1/encode", content=file_of(photo))
        assert answer.status_code == 503
        assert "longer than 0.2 s" in answer.json()["error"]


def test_a_failure_inside_is_not_shown(settings, photo):
    class Broken:
        async def call(self, method, *arguments):
            if method == "facts":
                return {"bits": 10}
            raise RuntimeError("/secret/path/model.py broke")

    with TestClient(app_of(Broken(), settings.limits), raise_server_exceptions=False) as client:
        wait_until_loaded(client)
        answer = client.post("/v1/encode", content=file_of(photo))
        assert answer.status_code == 500
        assert answer.json() == {"error": "the service failed; its log says why"}


def test_a_model_that_fails_while_it_is_loaded_is_loaded_again(settings, monkeypatch, caplog):
    monkeypatch.setattr("bsq_ray.serving.http.api._FAILED_PAUSE", 0.01)

    class Late:
        failures = 2

        async def call(self, method, *arguments):
            if self.failures:
                self.failures -= 1
                raise RuntimeError("no room for the model")
            return {"bits": 10}

    with TestClient(app_of(Late(), settings.limits)) as client:
        wait_until_loaded(client)
    assert caplog.text.count("the model small cannot be loaded; trying again") == 2


def test_with_authentication_only_the_page_and_health_are_open(settings, replicas, photo):
    with TestClient(make_app(settings, replicas, digest(TOKEN))) as client:
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
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("encode", "decode", "reconstruct", "compress", "decompress", "measure", "generate"):
                assert client.post(f"/v1/{path}", content=b"x" * 10_000_000, headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.post("/v1/encode", content=file_of(photo), headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.0.1:80", "[::1]", "[::1]:8000")),
        *(
            (host, 403)
            for host in ("attacker.example:8000", "localhost.attacker.example", "127.0.0.1.attacker.example")
        ),
        *((host, 403) for host in ("192.168.1.5:8000", "attacker@example", "[::1", "[::2]", "")),
    ],
)
def test_without_a_token_a_page_whose_name_was_made_to_lead_here_is_refused(client, photo, host, status):
    paths = {path: client.get(path, headers={"Host": host}) for path in ("/v1/models", "/metrics")}
    paths["/v1/encode"] = client.post("/v1/encode", content=file_of(photo), headers={"Host": host})
    assert {path: answer.status_code for path, answer in paths.items()} == dict.fromkeys(paths, status)
    if status == 403:
        assert all("takes requests to localhost" in answer.json()["error"] for answer in paths.values())


def test_the_interface_describes_itself_without_outside_scripts(client):
    schema = client.get("/openapi.json").json()
    assert {path for path in schema["paths"] if path.startswith("/v1")} == {
        f"/v1/{name}"
        for name in ("encode", "decode", "reconstruct", "compress", "decompress", "measure", "generate", "models")
    }
    assert schema["paths"]["/v1/compress"]["post"]["requestBody"]["content"] == {
        kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/*", "video/*")
    }
    given = {path: set(route["post"]["responses"]["200"]["content"]) for path, route in schema["paths"].items()
             if "post" in route}  # fmt: skip
    assert given["/v1/decompress"] == {"image/png", "video/mp4", "video/x-matroska"}
    assert given["/v1/encode"] == {"application/json"}
    for path in ("/docs", "/"):
        answer = client.get(path)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "http" not in answer.text.replace("http interface", "")
    assert all(path in client.get("/docs").text for path in schema["paths"])
    assert client.get("/page/../api.py").status_code == 404
