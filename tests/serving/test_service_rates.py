"""Rates and planes of nested bits over HTTP: choosing a rate, and decoding the first planes of a file."""

import io

import numpy as np
import pytest
from local_service import encode_image, save_models
from PIL import Image
from small_codecs import save_nested_codec, save_nested_tokenizer
from small_videos import make_street_video

from bsq_ray import Codec
from bsq_ray.codec.rate import Rate
from bsq_ray.serving.replicas.model_metadata import stored_fields
from bsq_ray.serving.service_config import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Models with 4, 7, 10 nested bits, with a prior of 2-bit planes, of clips, and without nested bits."""
    folder = tmp_path_factory.mktemp("models")
    nested = {
        "nested": save_nested_tokenizer(folder / "nested"),
        "nested-prior": save_nested_codec(folder / "nested-prior"),
        "nested-clips": save_nested_tokenizer(folder / "nested-clips", frames=2),
    }
    return Settings(models=nested | {"fixed": save_models(folder)["small"]}, authentication=False)


@pytest.fixture(scope="module")
def body(photo):
    return encode_image(photo)


def compress(client, body, **parameters):
    response = client.post("/v1/compress", params={"model": "nested"} | parameters, content=body)
    assert response.status_code == 200, response.text
    return response.content


def decompress(client, file, **parameters):
    """Return the response, and the decoded pixels of an image."""
    response = client.post("/v1/decompress", params=parameters, content=file)
    assert response.status_code == 200, response.text
    is_image = response.headers["content-type"] == "image/png"
    return response, np.asarray(Image.open(io.BytesIO(response.content))) if is_image else None


def test_models_list_the_bits_that_files_can_store(client, settings):
    """A model without nested bits has none to select; stored models list the same as loaded ones."""
    models = {model["name"]: model["selectable_bits"] for model in client.get("/v1/models").json()["models"]}
    expected = {
        "nested": [*range(1, 11)],
        "nested-prior": [2, 4, 6, 8, 10],
        "nested-clips": [*range(1, 11)],
        "fixed": [],
    }
    assert models == expected
    assert {name: stored_fields(url)["selectable_bits"] for name, url in settings.models.items()} == expected


@pytest.mark.parametrize(("name", "bits"), [("nested", 7), ("nested-prior", 8)])
def test_compress_bits_match_library_and_measure(client, settings, photo, body, name, bits):
    """A file of fewer bits equals the library's, is measured at its rate, and decodes to these bits."""
    data = compress(client, body, model=name, bits=bits)
    codec = Codec.from_pretrained(settings.models[name])
    assert data == codec.compress(photo, rate=Rate(bits)).data
    assert len(data) < len(compress(client, body, model=name))
    response, pixels = decompress(client, data)
    assert response.headers["x-bits-per-token"] == f"{bits}/{bits}"
    report = client.post("/v1/measure", params={"model": name, "bits": bits}, content=body).json()
    assert report["bytes"] == len(data)
    difference = np.asarray(photo, float) - pixels
    assert report["psnr"] == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()), abs=0.01)


@pytest.mark.parametrize(
    ("model", "bits", "message"),
    [
        ("nested", "11", "bits: tokens cannot be cut to 11 bits; use 1 to 10"),
        ("nested-prior", "5", "use 2 to 10 in steps of 2"),
        ("nested", "0", "bits: input should be greater than or equal to 1"),
        ("nested", "many", "bits: input should be a valid integer"),
        ("fixed", "5", "bits: the rate of this model is fixed"),
    ],
)
@pytest.mark.parametrize("path", ["compress", "measure"])
def test_invalid_bits_return_422(client, body, path, model, bits, message):
    response = client.post(f"/v1/{path}", params={"model": model, "bits": bits}, content=body)
    assert response.status_code == 422
    assert message in response.json()["error"]


@pytest.mark.parametrize(("name", "levels"), [("nested", [4, 7, 10]), ("nested-prior", [4, 8, 10])])
def test_decompress_planes_equals_files_of_fewer_bits(client, body, name, levels):
    """The first planes give the pixels of a file of their bits; headers name bits and bytes."""
    data = compress(client, body, model=name)
    sizes = []
    for num_planes, bits in enumerate(levels, 1):
        response, pixels = decompress(client, data, planes=num_planes)
        assert np.array_equal(pixels, decompress(client, compress(client, body, model=name, bits=bits))[1])
        assert response.headers["x-bits-per-token"] == f"{bits}/10"
        size, available = map(int, response.headers["x-bytes"].split("/"))
        assert available == len(data)
        assert response.headers["x-bits-per-pixel"] == f"{8 * size / (160 * 120):.6g}"
        sizes.append(size)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == len(data)
    response, _ = decompress(client, data, planes=100)
    assert response.headers["x-bits-per-token"] == "10/10"


def test_decompress_cut_file_reports_missing_bits(client, body):
    """A cut file decodes to its last whole plane, and the response reports that bits are missing."""
    data = compress(client, body)
    size = int(decompress(client, data, planes=2)[0].headers["x-bytes"].split("/")[0])
    response, pixels = decompress(client, data[: size + 3])
    assert response.headers["x-bits-per-token"] == "7/10"
    assert response.headers["x-bytes"] == f"{size}/{size}"
    assert np.array_equal(pixels, decompress(client, compress(client, body, bits=7))[1])


def test_decompress_planes_of_fixed_rate_is_whole_file(client, body):
    """Files without nested bits are one plane."""
    data = compress(client, body, model="fixed")
    response, pixels = decompress(client, data, planes=1)
    assert response.headers["x-bits-per-token"] == "10/10"
    assert response.headers["x-bytes"] == f"{len(data)}/{len(data)}"
    assert np.array_equal(pixels, decompress(client, data)[1])
    assert client.post("/v1/decompress", params={"planes": 1}, content=data[:-1]).status_code == 422
    assert "planes: input" in client.post("/v1/decompress?planes=0", content=data).json()["error"]


def test_clip_has_rates_and_planes(client):
    """Clips take the same options as images."""
    clip = make_street_video(4, size=(48, 32))
    data = compress(client, clip, model="nested-clips")
    assert len(compress(client, clip, model="nested-clips", bits=4)) < len(data)
    response, _ = decompress(client, data, planes=1)
    assert response.headers["x-frames"] == "4"
    assert response.headers["x-bits-per-token"] == "4/10"
