"""Models with local attention serve images and videos at their own size, as the library computes them."""

import base64
import io

import numpy as np
import pytest
import torch
from local_service import encode_image
from PIL import Image
from small_models import save_any_size
from small_videos import make_street_video, video_of_two_sizes

from bsq_ray import Tokenizer
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.media.video_reader import read_video
from bsq_ray.models.tokenizer import Tokens
from bsq_ray.serving.service_config import Limits, Settings

BITS, PATCH = 10, 8


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {"any": save_any_size(folder / "any", 1), "clips": save_any_size(folder / "clips", 3)}
    limits = Limits(max_pixels=300_000, max_video_pixels=1_000_000, request_timeout_s=60)
    return Settings(models=models, limits=limits, authentication=False)


@pytest.fixture(scope="module")
def tokenizer(settings):
    return Tokenizer.from_pretrained(settings.models["any"])


def open_png(response):
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def assert_same_pixels(decoded_HWC, expected_3HW):
    """Halves may be rounded to either level, because the service rounds in fp64."""
    difference = np.abs(decoded_HWC.transpose(2, 0, 1).astype(int) - expected_3HW.numpy())
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


def bits_of(response):
    packed = np.frombuffer(base64.b64decode(response["packed"]), np.uint8).reshape(-1, -(-BITS // 8))
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :BITS].astype(bool)


def with_whole_patches(photo):
    """Pixels (1, 3, H, W) whose right and lower edges are replicated to whole patches."""
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float()
    padding = 0, -photo.width % PATCH, 0, -photo.height % PATCH
    return to_float(torch.nn.functional.pad(pixels, padding, mode="replicate").to(torch.uint8))


@pytest.mark.parametrize("size", [(160, 120), (64, 64), (101, 37), (8, 200), (3, 5), (1, 1)])
def test_tokens_and_pixels_are_those_of_the_library(client, tokenizer, photo, size):
    """The service pads to whole patches, and reconstructions have the size of the image."""
    image = photo.resize(size)
    tokens = tokenizer.encode(with_whole_patches(image))
    response = client.post("/v1/encode", content=encode_image(image)).json()
    assert response["grid"] == list(tokens.grid) == [1, -(-size[1] // PATCH), -(-size[0] // PATCH)]
    assert np.array_equal(bits_of(response), tokens.bits_BNL[0].numpy())
    decoded = open_png(client.post("/v1/decode", json=response))
    [expected] = to_uint8(tokenizer.decode(tokens))
    assert_same_pixels(decoded, expected)
    reconstructed = client.post("/v1/reconstruct", content=encode_image(image))
    assert np.array_equal(open_png(reconstructed), decoded[: size[1], : size[0]])
    num_tokens = len(tokens.bits_BNL[0])
    assert float(reconstructed.headers["x-bits-per-pixel"]) == pytest.approx(
        num_tokens * BITS / (size[0] * size[1]), rel=1e-5
    )


@pytest.mark.parametrize("size", [(1400, 16), (16, 2600), (660, 450)])
def test_large_images_have_the_tokens_of_the_library(client, tokenizer, photo, size):
    """175 and 325 tokens in a row are more than a block; 660 x 450 pixels are computed in the thread of the codec."""
    image = photo.resize(size)
    response = client.post("/v1/encode", content=encode_image(image)).json()
    tokens = tokenizer.encode(with_whole_patches(image))
    assert np.mean(bits_of(response) != tokens.bits_BNL[0].numpy()) < 1e-3
    decoded = open_png(client.post("/v1/decode", json=response))
    expected = to_uint8(tokenizer.decode(Tokens(torch.from_numpy(bits_of(response))[None], tokens.grid)))[0]
    assert_same_pixels(decoded, expected)


def test_images_of_few_rows_are_limited_by_their_patches(client, photo):
    """200,000 x 1 pixels are 1,600,000 in patches, which encoding and decoding would compute."""
    for path in ("encode", "reconstruct"):
        response = client.post(f"/v1/{path}", content=encode_image(photo.resize((200_000, 1))))
        assert response.status_code == 413, response.text
        assert "more than twice the limit of 300000" in response.json()["error"]


def test_large_images_and_chunks_are_computed_in_the_thread_of_the_codec(replicas):
    for name in ("any", "clips"):
        role = replicas[name]["tokenizer"]
        assert role._thread_for(2**18) is role._model_thread
        assert role._thread_for(2**18 + 1) is role._codec_thread is not role._model_thread


def test_models_list_any_size(client):
    models = client.get("/v1/models").json()["models"]
    assert [(model["any_size"], model["image_size"]) for model in models] == [(True, 64)] * 2


@pytest.mark.parametrize("name", ["any", "clips"])
def test_videos_keep_their_size(client, settings, name):
    """Tokens and frames are those of one pass over as many frames as the model has."""
    clip = make_street_video(5, size=(76, 44), container_format="matroska", codec="ffv1")
    tokenizer = Tokenizer.from_pretrained(settings.models[name])
    frames = torch.from_numpy(np.stack(list(read_video(io.BytesIO(clip)).frames))).permute(3, 0, 1, 2)
    whole = torch.nn.functional.pad(frames.float(), (0, 4, 0, 4), mode="replicate").to(torch.uint8)[None]
    tokens = [tokenizer.encode(to_float(part)) for part in whole.split(tokenizer.config.frames, 2)]
    if name == "clips":
        alone = tokenizer.encode(to_float(whole[:, :, 2]))
        assert not torch.equal(alone.bits_BNL, tokens[0].bits_BNL[:, -60:]), "frames depend on earlier ones"
    response = client.post("/v1/encode", params={"model": name}, content=clip).json()
    assert response["grid"] == [5, 6, 10]
    assert np.array_equal(bits_of(response), torch.cat([part.bits_BNL[0] for part in tokens]).numpy())
    decoded = client.post("/v1/decode", json=response, headers={"Accept": "video/x-matroska"})
    decoded_THWC = np.stack(list(read_video(io.BytesIO(decoded.content)).frames))
    expected = [to_uint8(tokenizer.decode(part)).reshape(3, -1, 48, 80) for part in tokens]
    for frame_HWC, expected_3HW in zip(decoded_THWC, torch.cat(expected, 1).unbind(1), strict=True):
        assert_same_pixels(frame_HWC, expected_3HW)
    reconstructed = client.post(
        "/v1/reconstruct", params={"model": name}, content=clip, headers={"Accept": "video/x-matroska"}
    )
    reconstructed_THWC = np.stack(list(read_video(io.BytesIO(reconstructed.content)).frames))
    assert np.array_equal(reconstructed_THWC, decoded_THWC[:, :44, :76])
    assert float(reconstructed.headers["x-bits-per-pixel"]) == pytest.approx(60 * BITS / (76 * 44), rel=1e-5)


@pytest.mark.parametrize("name", ["any", "clips"])
def test_videos_with_large_frames_and_tokens_of_encode_are_accepted(client, settings, name):
    """660 x 450 pixels are computed in the thread of the codec, and are fewer than those of whole patches."""
    clip = make_street_video(2, size=(660, 450))
    response = client.post("/v1/encode", params={"model": name}, content=clip).json()
    assert response["grid"] == [2, 57, 83]
    decoded = client.post("/v1/decode", json=response, headers={"Accept": "video/x-matroska"})
    assert np.stack(list(read_video(io.BytesIO(decoded.content)).frames)).shape == (2, 456, 664, 3)


@pytest.mark.parametrize("name", ["any", "clips"])
@pytest.mark.parametrize("path", ["encode", "reconstruct"])
def test_videos_whose_frames_change_size_are_named(client, name, path):
    clip = video_of_two_sizes()
    response = client.post(f"/v1/{path}", params={"model": name}, content=clip)
    assert response.status_code == 422, response.text
    assert "frame 2 of the video has 96 x 80 pixels and frame 0 64 x 48" in response.json()["error"]


@pytest.mark.parametrize(
    ("grid", "num_tokens", "status", "message"),
    [
        ([2, 4, 4], 31, 422, "it expects grid [frames, rows, columns] and for each token 2 bytes"),
        ([2, 0, 4], 0, 422, "it expects grid [frames, rows, columns]"),
        ([2, 70, 70], 9_800, 413, "the image has at least 305809 pixels, more than 300000"),
        ([5, 60, 60], 18_000, 413, "the video has more than 1000000 pixels in all frames"),
        ([2, 1, 20_000], 40_000, 413, "have 1280000 pixels, more than twice the limit of 300000"),
    ],
)
def test_tokens_of_videos_that_do_not_fit_are_named(client, grid, num_tokens, status, message):
    body = {"grid": grid, "bits": BITS, "packed": base64.b64encode(bytes(2 * num_tokens)).decode(), "model": "clips"}
    response = client.post("/v1/decode", json=body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("grid", "num_tokens", "status", "message"),
    [
        ([1, 4, 4], 15, 422, "for each token 2 bytes"),
        ([1, 0, 4], 0, 422, "expects grid"),
        ([1, 100, 100], 10_000, 413, "the image has at least 628849 pixels, more than 300000"),
        ([1, 1, 20_000], 20_000, 413, "have 1280000 pixels, more than twice the limit of 300000"),
    ],
)
def test_tokens_that_do_not_fit_are_named(client, grid, num_tokens, status, message):
    body = {"grid": grid, "bits": BITS, "packed": base64.b64encode(bytes(2 * num_tokens)).decode()}
    response = client.post("/v1/decode", json=body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]


def test_tokens_of_a_photo_decode_as_the_library_decodes_them(tokenizer, client):
    """Any grid, also one that no image of the training had."""
    rng = np.random.default_rng(0)
    bits = rng.random((1, 3 * 21, BITS)) < 0.5
    packed = np.packbits(np.pad(bits[0], ((0, 0), (0, 6))), axis=1, bitorder="little")
    body = {"grid": [1, 3, 21], "bits": BITS, "packed": base64.b64encode(packed.tobytes()).decode()}
    [expected] = to_uint8(tokenizer.decode(Tokens(torch.from_numpy(bits), (1, 3, 21))))
    assert_same_pixels(open_png(client.post("/v1/decode", json=body)), expected)
