"""The HTTP API: formats of requests and responses, and messages for invalid requests."""

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from local_service import encode_image, save_models
from PIL import Image
from small_images import damaged_avif, encode, tiff

from bsq_ray import Codec, Generator, Tokenizer
from bsq_ray.codec.varint import write_varint
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.serving.service_config import Limits, Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    limits = Limits(max_pixels=300_000, request_timeout_s=60)
    return Settings(models=save_models(tmp_path_factory.mktemp("models")), limits=limits, authentication=False)


def open_png(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(response.content))


def test_list_models_reports_capabilities(client, settings):
    """GET /v1/models lists every model with its capabilities and metadata."""
    models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert models["small"]["capabilities"] == ["encode", "decode", "reconstruct", "compress", "decompress", "measure"]
    assert models["prior"]["capabilities"] == ["compress", "decompress", "measure"]
    assert models["generator"]["capabilities"] == ["generate"]
    assert models["small"]["tokenizer_id"] == Tokenizer.from_pretrained(settings.models["small"]).model_id
    assert models["generator"]["num_classes"] == 4


def test_encode_decode_photo_matches_library(client, settings, photo):
    """Tokens and pixels from the service equal those of the library."""
    tokenizer = Tokenizer.from_pretrained(settings.models["small"])
    original = to_float(torch.from_numpy(eval_transform(photo, 64, "lanczos"))[None])
    tokens = tokenizer.encode(original)
    response = client.post("/v1/encode", content=encode_image(photo)).json()
    assert (response["model"], response["grid"], response["bits"]) == ("small", [1, 8, 8], 10)
    packed = np.frombuffer(base64.b64decode(response["packed"]), np.uint8).reshape(64, 2)
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, :10]
    assert np.array_equal(bits, tokens.bits_BNL[0].numpy())
    decoded = np.asarray(open_png(client.post("/v1/decode", json=response)))
    [expected] = to_uint8(tokenizer.decode(tokens))
    assert np.array_equal(decoded.transpose(2, 0, 1), expected.numpy())
    reconstructed = client.post("/v1/reconstruct", content=encode_image(photo))
    assert np.array_equal(np.asarray(open_png(reconstructed)), decoded)
    assert reconstructed.headers["x-bits-per-pixel"] == "0.15625"
    assert 5 < float(reconstructed.headers["x-psnr"]) < 40


@pytest.mark.parametrize("name", ["small", "prior"])
def test_compress_matches_library_and_selects_model(client, settings, photo, name):
    """A .bsq file equals the library's, and decompression selects the model that wrote it."""
    response = client.post("/v1/compress", params={"model": name}, content=encode_image(photo))
    codec = Codec.from_pretrained(settings.models[name])
    assert response.content == codec.compress(photo).data
    assert response.headers["x-bits-per-pixel"] == f"{8 * len(response.content) / (160 * 120):.6g}"
    decompressed = client.post("/v1/decompress", content=response.content)
    assert decompressed.headers["x-model"] == name
    assert np.array_equal(np.asarray(open_png(decompressed)), np.asarray(codec.decompress(response.content)))


def test_measure_reports_quality_and_baseline_sizes(client, photo):
    """Measuring returns quality metrics and the sizes of JPEG and WebP files of equal quality."""
    report = client.post("/v1/measure", content=encode_image(photo)).json()
    assert report["bits_per_pixel"] == pytest.approx(8 * report["bytes"] / (160 * 120))
    assert report["lpips"] > 0
    for metric in ("psnr", "lpips"):
        for codec in ("JPEG", "WebP"):
            standard = report["equal"][metric][codec]
            assert len(standard_codecs()[codec].encode(photo, standard["quality"])) == standard["bytes"]


def test_generate_streams_one_image_per_step(client, settings):
    """Generation streams one image per step, and the last one equals the library's."""
    body = {"class": 2, "seed": 5, "steps": 4, "guidance_scale": 1.5}
    response = client.post("/v1/generate", json=body)
    assert response.headers["content-type"] == "application/x-ndjson"
    steps = [json.loads(line) for line in response.text.splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["steps"] == 4 and step["seed"] == 5 for step in steps)
    images = [Image.open(io.BytesIO(base64.b64decode(step["image"].split(",")[1]))) for step in steps]
    gray = [(np.asarray(image) == 128).all(-1).mean() for image in images]
    assert gray[0] > gray[1] > gray[2]
    generator = Generator.from_pretrained(settings.models["generator"])
    [expected] = to_uint8(generator.generate([2], 5, steps=4, guidance_scale=1.5))
    assert np.array_equal(np.asarray(images[-1]).transpose(2, 0, 1), expected.numpy())
    png_response = client.post("/v1/generate", json=body, headers=PNG)
    assert np.array_equal(np.asarray(open_png(png_response)), np.asarray(images[-1]))
    assert client.post("/v1/generate", json={"class": 0, "steps": 1}, headers=PNG).headers["x-seed"]


PNG = {"Accept": "image/png"}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_encode_accepts_common_image_formats(client, photo, image_format):
    """Images in all common formats are accepted with any plausible content type."""
    for headers in (
        {},
        {"Content-Type": "application/octet-stream"},
        {"Content-Type": f"image/{image_format.lower()}"},
    ):
        assert client.post("/v1/encode", content=encode_image(photo, image_format), headers=headers).status_code == 200


def test_decompression_bomb_returns_413(client):
    """A PNG whose header declares too many pixels is rejected before it is decoded."""

    def chunk(image_format, data):
        return struct.pack(">I", len(data)) + image_format + data + struct.pack(">I", zlib.crc32(image_format + data))

    for side in (1000, 12_000, 100_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
        for path in ("encode", "reconstruct", "compress", "measure"):
            response = client.post(f"/v1/{path}", content=bomb)
            assert response.status_code == 413
            assert "300000" in response.json()["error"]


def animated(photo, file_format):
    return encode(photo, file_format, save_all=True, append_images=[photo.rotate(180)])


def with_claimed_width(file, width):
    """Return a .bsq file with another width in its header."""
    return file[:5] + write_varint(width - 1) + file[7:]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("encode", b"", 422, "empty"),
        ("encode", b"no image", 415, "not an image or video"),
        ("encode", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not an image or video"),
        ("encode", lambda photo, _: b"data:image/png;base64," + base64.b64encode(encode_image(photo)), 415, "data URL"),
        ("encode", lambda photo, _: base64.b64encode(encode_image(photo)), 415, "base64; send the bytes"),
        ("compress", lambda photo, _: base64.b64encode(encode_image(photo, "JPEG")), 415, "base64; send the bytes"),
        ("compress", lambda photo, _: encode_image(photo)[:3000], 422, "damaged"),
        ("compress", lambda photo, _: animated(photo, "GIF"), 422, "it is an animation"),
        ("encode", lambda photo, _: animated(photo, "AVIF"), 422, "it is an animation"),
        ("reconstruct", lambda photo, _: animated(photo, "WEBP"), 422, "it is an animation"),
        ("measure", lambda photo, _: animated(photo, "PNG"), 422, "it is an animation"),
        ("compress", lambda photo, _: encode(photo, "PNG")[:8], 422, "damaged"),
        ("compress", lambda photo, _: damaged_avif(photo), 422, "the image"),
        ("measure", lambda photo, _: tiff(np.array([[-1, 0]], np.float32)), 422, "values reach from -1 to 0"),
        ("encode?model=other", lambda photo, _: encode_image(photo), 404, "unknown model other"),
        ("encode?model=generator", lambda photo, _: encode_image(photo), 422, "generator cannot encode"),
        ("decompress", b"no file", 415, "not a .bsq file"),
        ("decompress", lambda _, file: file[:60], 422, "truncated"),
        ("decompress", lambda _, file: file[:-1] + bytes([file[-1] ^ 1]), 422, "checksum"),
        ("decompress", lambda _, file: with_claimed_width(file, 2**31), 422, "claims"),
        ("decompress", lambda _, file: file[:8] + bytes(2) + file[10:], 422, "which this service does not have"),
        ("decode", b"[1, 2", 415, "not JSON"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 10}', 422, "packed"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 9, "packed": ""}', 422, "bits"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 10, "packed": "%%"}', 422, "base64"),
        ("decode", b'{"grid": [1, 8, 8], "bits": 10, "packed": "AAAA"}', 422, "for each token 2 bytes"),
        ("decode", b'{"grid": [8, 8], "bits": 10, "packed": "AAAA"}', 422, "grid"),
        ("generate", b'{"class": 7}', 422, "classes 0 to 3"),
        ("generate", b'{"class": 99999999999999999999999}', 422, "class"),
        ("generate", b'{"class": 0, "steps": 0}', 422, "steps"),
        ("generate", b'{"class": 0, "steps": 5000}', 422, "at most 256"),
        ("generate", b'{"class": 0, "guidance_scale": "much"}', 422, "guidance_scale"),
        ("generate", b'{"class": 0, "size": 3}', 422, "size"),
        ("generate", b'{"class": 0, "model": "small"}', 422, "small cannot generate"),
        ("nothing", b"", 404, "not found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_request_returns_error_message(client, photo, path, body, status, message):
    """An invalid request returns a status code and a message without a traceback or a path."""
    if callable(body):
        body = body(photo, client.post("/v1/compress", content=encode_image(photo)).content)
    response = client.post(f"/v1/{path}", content=body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]
    assert "Traceback" not in response.text
    assert "/" not in response.json()["error"].replace("application/", "")


def test_multipart_form_returns_415_with_hint(client, photo):
    """A multipart form is rejected with a hint on how to send the file."""
    response = client.post("/v1/encode", files={"file": encode_image(photo)})
    assert response.status_code == 415
    assert "--data-binary" in response.json()["error"]


def test_openapi_and_docs_need_no_external_scripts(client):
    """The OpenAPI schema and the documentation page load nothing from other hosts."""
    schema = client.get("/openapi.json").json()
    assert {path for path in schema["paths"] if path.startswith("/v1")} == {
        f"/v1/{name}"
        for name in ("encode", "decode", "reconstruct", "compress", "decompress", "measure", "generate", "models")
    }
    assert schema["paths"]["/v1/compress"]["post"]["requestBody"]["content"] == {
        image_format: {"schema": {"type": "string", "format": "binary"}} for image_format in ("image/*", "video/*")
    }
    response_types = {path: set(route["post"]["responses"]["200"]["content"]) for path, route in schema["paths"].items()
             if "post" in route}  # fmt: skip
    assert response_types["/v1/decompress"] == {"image/png", "video/mp4", "video/x-matroska"}
    assert response_types["/v1/encode"] == {"application/json"}
    for path in ("/docs", "/"):
        response = client.get(path)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert "http" not in response.text
    assert all(path in client.get("/docs").text for path in schema["paths"])
    assert client.get("/page/../api.py").status_code == 404
