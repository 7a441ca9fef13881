"""Videos in requests and responses: equality with the command line, limits, and other requests at the same time."""

import asyncio
import base64
import io
import json
import resource
import struct
import time
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
import torch
from local_service import save_models, save_video_models
from PIL import Image
from small_videos import make_street_video

from bsq_ray import Generator, Tokenizer
from bsq_ray.codec.container import read_header
from bsq_ray.codec.files import compress_file, decompress_file
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_clip
from bsq_ray.media.video_reader import read_video
from bsq_ray.models.quantizers.bits import pack_bits
from bsq_ray.serving.deadline import deadline_after
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media import video_io
from bsq_ray.serving.media.video_sandbox import _SUBPROCESS_CODE, read_video_sandboxed
from bsq_ray.serving.service_config import Limits, Settings

MKV, MP4 = {"Accept": "video/x-matroska"}, {"Accept": "video/mp4"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {"small": save_models(folder)["small"]} | save_video_models(folder)
    limits = Limits(max_body_mb=1, max_pixels=10_000, max_video_pixels=200_000, request_timeout_s=60)
    return Settings(models=models, limits=limits, authentication=False)


@pytest.fixture(scope="module")
def clip():
    """A video file: ten frames of a street, 64 x 48 pixels."""
    return make_street_video(10)


@pytest.fixture(scope="module")
def photo(photos):
    file = io.BytesIO()
    photos[0].resize((80, 60)).save(file, "PNG")
    return file.getvalue()


def decode_response(response, media_type):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == media_type
    return np.stack(list(read_video(io.BytesIO(response.content)).frames))


@pytest.mark.parametrize("name", ["clips", "noncausal", "small"])
def test_video_encode_decode_matches_library(client, settings, clip, name, tmp_path):
    """Tokens and frames equal those of the library, for a causal, a non-causal and an image model."""
    tokenizer = Tokenizer.from_pretrained(settings.models[name])
    size, side = tokenizer.config.image_size, tokenizer.config.image_size // 8
    originals = [
        to_float(torch.from_numpy(eval_transform(Image.fromarray(frame), size, "lanczos"))[None])
        for frame in read_video(io.BytesIO(clip)).frames
    ]
    if name == "noncausal":
        tokens = [tokenizer.encode(torch.stack(originals[n : n + 4], 2)) for n in (0, 4, 8)]
        expected = torch.cat([tokenizer.decode(part) for part in tokens], 2)
    else:
        tokens = list(tokenizer.encode_stream(originals))
        expected = torch.cat(list(tokenizer.decode_stream(tokens)), 2)
    expected = to_uint8(expected)[0].permute(1, 2, 3, 0).numpy()
    response = client.post("/v1/encode", params={"model": name}, content=clip).json()
    packed = torch.cat([pack_bits(part.bits_BNL)[0] for part in tokens]).numpy().tobytes()
    assert response == {
        "model": name, "grid": [10, side, side], "bits": 10, "rate": "25", "packed": base64.b64encode(packed).decode(),
    }  # fmt: skip
    decoded = client.post("/v1/decode", json=response, headers=MKV)
    assert np.array_equal(decode_response(decoded, "video/x-matroska"), expected)
    assert decoded.headers["x-frames"] == "10"
    reconstructed = client.post("/v1/reconstruct", params={"model": name}, content=clip, headers=MKV)
    assert np.array_equal(decode_response(reconstructed, "video/x-matroska"), expected)
    (tmp_path / "clip.mp4").write_bytes(clip)
    report = reconstruct_clip(settings.models[name], str(tmp_path / "clip.mp4"), tmp_path / "reconstruction.mp4")
    assert f"PSNR {float(reconstructed.headers['x-psnr']):.2f} dB" in report
    assert reconstructed.headers["x-bits-per-pixel"] == "0.15625"
    for path, body in (("reconstruct", clip), ("decode", json.dumps(response).encode())):
        decoded_mp4 = client.post(f"/v1/{path}", params={"model": name}, content=body)
        mp4_frames = decode_response(decoded_mp4, "video/mp4").astype(int)
        assert np.abs(mp4_frames - expected).mean() < 8, "H.264 with subsampled color changes little"


@pytest.mark.parametrize("name", ["clips", "clip-prior", "small"])
def test_video_compress_matches_command_line(client, settings, clip, name, tmp_path):
    """The .bsq file of a video and its decoded videos equal those of the command line."""
    response = client.post("/v1/compress", params={"model": name}, content=clip)
    (tmp_path / "clip.mp4").write_bytes(clip)
    compress_file(settings.models[name], str(tmp_path / "clip.mp4"), str(tmp_path / "clip.bsq"))
    assert response.content == (tmp_path / "clip.bsq").read_bytes()
    assert response.headers["content-disposition"] == 'attachment; filename="clip.bsq"'
    assert response.headers["x-frames"] == "10"
    assert response.headers["x-bits-per-pixel"] == f"{8 * len(response.content) / (64 * 48 * 10):.6g}"
    for kind, headers, media_type in (("mkv", {}, "video/x-matroska"), ("mp4", MP4, "video/mp4")):
        decompressed = client.post("/v1/decompress", content=response.content, headers=headers)
        assert decompressed.headers["x-model"] == name
        decompress_file(settings.models[name], str(tmp_path / "clip.bsq"), str(tmp_path / f"back.{kind}"))
        expected = np.stack(list(read_video(str(tmp_path / f"back.{kind}")).frames))
        assert np.array_equal(decode_response(decompressed, media_type), expected)


def test_upload_selects_video_or_image_model(client, clip, photo):
    """A video selects a video model and an image selects an image model."""
    for path, body in (("encode", clip), ("encode", photo)):
        assert client.post(f"/v1/{path}", content=body).json()["model"] == ("clips" if body == clip else "small")
    for path in ("compress", "reconstruct"):
        assert client.post(f"/v1/{path}", content=clip).headers["x-model"] == "clips"
        assert client.post(f"/v1/{path}", content=photo).headers["x-model"] == "small"
    # An image is a clip of one frame.
    image = client.post("/v1/compress", params={"model": "clips"}, content=photo)
    decompressed = client.post("/v1/decompress", content=image.content)
    assert (decompressed.headers["x-model"], decompressed.headers["content-type"]) == ("clips", "image/png")


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("mp4", "libx264"), ("mov", "mjpeg"), ("matroska", "ffv1"), ("webm", "libvpx"), ("avi", "mpeg4"), ("3gp", "mpeg4"),
     ("asf", "wmv2"), ("ogg", "libvpx")],
)  # fmt: skip
def test_encode_accepts_common_video_formats(client, kind, codec):
    """Videos in all common formats are accepted with any plausible content type."""
    body = make_street_video(
        3, container_format=kind, codec=codec, pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p"
    )
    for headers in ({}, {"Content-Type": "application/octet-stream"}, {"Content-Type": "video/mp4"}):
        response = client.post("/v1/encode", content=body, headers=headers)
        assert response.status_code == 200, response.text
        assert response.json()["grid"] == [3, 4, 4]


def test_video_long_frame_rate_round_trips(client):
    """A frame rate with a long numerator and denominator, as of uneven frame times, is preserved."""
    rate = Fraction(1111050000, 37079123)
    tokens = client.post("/v1/encode", content=make_street_video(3, frame_rate=rate)).json()
    assert tokens["rate"] == str(rate)
    video = client.post("/v1/decode", json=tokens)
    assert video.status_code == 200, video.text
    assert read_video(io.BytesIO(video.content)).frame_rate == rate


def test_generate_video_returns_animated_webp(client, settings):
    """A video model generates an animated WebP that equals the library's frames."""
    body = {"class": 1, "seed": 3, "steps": 2, "model": "video-generator"}
    first, last = [json.loads(line) for line in client.post("/v1/generate", json=body).text.splitlines()]
    kind, data = last["image"].split(";base64,")
    assert (first["step"], last["step"], kind) == (1, 2, "data:image/webp")
    animation = Image.open(io.BytesIO(base64.b64decode(data)))
    frames = []
    for frame in range(animation.n_frames):
        animation.seek(frame)
        frames.append(np.asarray(animation.convert("RGB")))
    [expected] = to_uint8(Generator.from_pretrained(settings.models["video-generator"]).generate([1], 3, steps=2))
    assert np.array_equal(np.stack(frames), expected.permute(1, 2, 3, 0).numpy())
    webp_response = client.post("/v1/generate", json=body, headers={"Accept": "image/webp"})
    assert (webp_response.headers["content-type"], webp_response.content) == ("image/webp", base64.b64decode(data))


def avi_with_claimed_size(width, height, frames):
    """Return a video of one small raw frame whose header declares more and larger frames."""
    file = bytearray(
        make_street_video(1, size=(16, 16), container_format="avi", codec="rawvideo", pixel_format="bgr24")
    )
    file[48:52] = struct.pack("<I", frames)
    strh, strf = file.index(b"strh") + 8, file.index(b"strf") + 8
    file[strh + 32 : strh + 36] = struct.pack("<I", frames)
    file[strf + 4 : strf + 12] = struct.pack("<II", width, height)
    return bytes(file)


@pytest.mark.parametrize(
    ("claimed", "message"),
    [((8192, 8192, 1), "8192 x 8192 pixels"), ((16, 16, 1_000_000), "more than 200000 pixels")],
)
def test_video_header_over_limit_returns_413(client, claimed, message):
    """A video whose header claims too many pixels is rejected whatever follows."""
    for path in ("encode", "reconstruct", "compress"):
        response = client.post(f"/v1/{path}", content=avi_with_claimed_size(*claimed))
        assert response.status_code == 413
        assert message in response.json()["error"]


def test_video_frame_over_declared_size_returns_413(client):
    """Frames of 192 x 144 pixels in an MP4 that declares 16 x 16 are rejected."""
    file = bytearray(make_street_video(2, size=(192, 144)))
    offset = file.index(struct.pack(">HH", 192, 144), file.index(b"stsd"))
    file[offset : offset + 4] = struct.pack(">HH", 16, 16)
    for path in ("encode", "reconstruct", "compress"):
        response = client.post(f"/v1/{path}", content=bytes(file))
        assert response.status_code == 413, response.text
        assert "192 x 144 pixels" in response.json()["error"]


def test_video_without_length_is_rejected_undecoded(client, monkeypatch):
    """A video without a frame count in its header is rejected by the number of its packets."""
    frame_counts = []
    check = video_io.check_total_pixels
    monkeypatch.setattr(
        video_io, "check_total_pixels", lambda frames, *more: frame_counts.append(frames) or check(frames, *more)
    )
    body = make_street_video(250, container_format="matroska", codec="libx264")
    for path in ("encode", "reconstruct", "compress"):
        frame_counts.clear()
        response = client.post(f"/v1/{path}", content=body)
        assert response.status_code == 413
        assert "shorten or downscale it" in response.json()["error"]
        assert frame_counts == [250]


def mp4_with_claimed_samples(samples):
    """Return a video of three frames whose index declares more in one chunk; FFmpeg allocates a list for them."""
    file = bytearray(make_street_video(3))
    sizes, chunks = file.index(b"stsz") + 8, file.index(b"stsc") + 8
    file[sizes : sizes + 8] = struct.pack(">II", 1, samples)
    file[chunks + 8 : chunks + 12] = struct.pack(">I", samples)
    return bytes(file)


def test_video_huge_index_uses_no_service_memory(client):
    """A video index that requests gigabytes is rejected without memory use in the service."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in ("encode", "compress"):
        response = client.post(f"/v1/{path}", content=mp4_with_claimed_samples(30_000_000))
        assert response.status_code == 422, response.text
        assert "the video cannot be read" in response.json()["error"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000


def test_videos_are_decoded_in_a_subprocess(client, clip, monkeypatch):
    """Videos are opened in a subprocess, not in the service."""
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened in this process"))
    assert client.post("/v1/encode", content=clip).json()["grid"] == [10, 4, 4]


def count_decoding_subprocesses():
    count = 0
    for child in psutil.Process().children():
        # Children of other tests may be zombies, which have no command line.
        with suppress(psutil.NoSuchProcess):
            count += _SUBPROCESS_CODE in child.cmdline()
    return count


@pytest.mark.parametrize("timeout_s", [0.001, 1.0])
def test_video_over_timeout_raises_and_ends_subprocess(timeout_s):
    """The timeout applies while the video is opened and while its frames are iterated."""

    def read_slowly():
        for frame in read_video_sandboxed(make_street_video(60), "mov", max_pixels=10_000, timeout_s=timeout_s).frames:
            assert frame.shape == (48, 64, 3)
            time.sleep(0.1)

    with pytest.raises(ValueError, match="exceeds the memory or time limit of a request"):
        read_slowly()
    assert count_decoding_subprocesses() == 0


def test_closed_video_leaves_no_subprocess():
    """Closing a video ends its subprocess."""
    video = read_video_sandboxed(make_street_video(60), "mov", max_pixels=10_000, timeout_s=60)
    next(video.frames)
    video.frames.close()
    assert count_decoding_subprocesses() == 0


def with_flipped_bit(file, offset):
    return file[:offset] + bytes([file[offset] ^ 1]) + file[offset + 1 :]


def with_claimed_frames(file, frames):
    header = read_header(file)
    claimed_header = replace(header, clip=replace(header.clip, num_frames=frames))
    return claimed_header.pack() + file[len(header.pack()) :]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("encode", lambda clip, _: clip[:-1000], 422, "cannot be read"),
        ("compress", lambda clip, _: clip[:2000], 422, "cannot be read"),
        ("compress", b"\x1a\x45\xdf\xa3" + bytes(3000), 422, "cannot be read"),
        ("reconstruct", b"RIFF\x00\x00\x00\x00AVI " + bytes(3000), 422, "cannot be read"),
        ("encode", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x\n", 415, "not an image or video"),
        ("encode", b"ffconcat version 1.0\nfile /etc/passwd\n", 415, "not an image or video"),
        ("measure", lambda clip, _: clip, 415, "only images can be measured"),
        ("compress?model=video-generator", lambda clip, _: clip, 422, "video-generator cannot compress"),
        ("decompress", lambda _, file: with_claimed_frames(file, 1_000_000), 413, "more than 200000 pixels"),
        ("decompress", lambda _, file: with_flipped_bit(file, len(file) // 2), 422, "checksum"),
        ("decompress", lambda _, file: file[: len(file) // 2], 422, "truncated"),
        ("decode", {"grid": [3, 4, 4], "bits": 10, "packed": "AAAA"}, 422, "for each token 2 bytes"),
        ("decode", {"grid": [0, 4, 4], "bits": 10, "packed": ""}, 422, "expects grid"),
        ("decode", {"grid": [-1, 4, 4], "bits": 10, "packed": ""}, 422, "expects grid"),
        ("decode", {"grid": [1, 4, 4], "bits": 10, "packed": "", "rate": "1/0"}, 422, "rate"),
        ("decode", {"grid": [1, 4, 4], "bits": 10, "packed": "", "rate": "fast"}, 422, "rate"),
        ("decode", {"grid": [200, 4, 4], "bits": 10, "packed": "AAAA" * 2133 + "AA=="}, 413, "more than 200000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_invalid_video_request_returns_error_message(client, clip, path, body, status, message):
    """An invalid request returns a status code and a message without internals."""
    if callable(body):
        body = body(clip, client.post("/v1/compress", content=clip).content)
    if isinstance(body, dict):
        body = json.dumps({"model": "clips", **body}).encode()
    response = client.post(f"/v1/{path}", content=body)
    assert response.status_code == status, response.text
    assert message in response.json()["error"]
    assert not {"/", "<", "Errno"} & set(response.json()["error"].split())


def test_noncausal_model_rejects_image(client, photo):
    """A non-causal video model rejects images."""
    response = client.post("/v1/compress", params={"model": "noncausal"}, content=photo)
    assert response.status_code == 422
    assert "takes clips only" in response.json()["error"]


@pytest.mark.parametrize("end", ["cancelled", "late"])
def test_video_work_stops_when_cancelled_or_late(replicas, clip, end):
    """The work stops after the first chunk when the client disconnects or the deadline passes."""
    engine, calls = replicas["clips"]["tokenizer"]._engine.video, []

    def run_in_model_thread(num_pixels, function, *arguments):
        calls.append(1)
        if end == "cancelled":
            deadline.cancelled.set()
        else:
            object.__setattr__(deadline, "expires_at", 0.0)
        return function(*arguments)

    with deadline_after(60) as deadline, pytest.raises(ApiError, match="took longer than 60 s"):
        engine.reconstruct(clip, "video/mp4", run_in_model_thread=run_in_model_thread, deadline=deadline)
    assert len(calls) == 1


def test_images_are_served_during_video_work(replicas, photo):
    """Images are computed between the chunks of a long video."""
    replica, finished = replicas["clips"]["tokenizer"], []

    async def send_and_record(body, name):
        await replica.encode(body)
        finished.append(name)

    async def check():
        long = asyncio.create_task(send_and_record(make_street_video(60), "clip"))
        await asyncio.sleep(0.05)
        for n in range(3):
            await send_and_record(photo, f"image {n}")
        await long

    asyncio.run(check())
    assert finished[-1] == "clip"
