"""Mutated files through packing, streaming, the codec and the service: no run ends, and each damaged file is named.

mutated files ─┬─▶ pack ──────────▶ packed, or listed by name
               ├─▶ shard ─ stream ─▶ read, or skipped by name
               ├─▶ compress ──────▶ .bsq file, or an error that names the source
               └─▶ service ───────▶ 200, or an error of the request (4xx)
"""

import tarfile
from itertools import islice
from pathlib import Path

import pytest
from local_service import make_app, make_replicas, save_video_models, wait_until_loaded
from mutated_files import IMAGES, VIDEOS, mutated
from small_codecs import save_tokenizer
from starlette.testclient import TestClient

from bsq_ray import config
from bsq_ray.codec.files import compress_file
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.index import index_shards
from bsq_ray.data.inspect import inspect_shards
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images, pack_videos
from bsq_ray.data.stream import SkippedSamples, training_batches
from bsq_ray.serving.service_config import Limits, Settings

# Files of each kind; `--fuzz` has more.
NUM_FEW = 2
SUFFIXES = {
    "JPEG": "jpg", "progressive JPEG": "jpe", "MPO": "jfif", "PNG": "png", "PNG, palette": "png",
    "PNG with text": "png",
    "WebP": "webp", "lossless WebP": "webp", "animated WebP": "webp", "GIF": "gif", "animated GIF": "gif", "BMP": "bmp",
    "TIFF": "tif", "TIFF, CMYK": "tiff", "TIFF of floats": "tif", "AVIF": "avif", "JPEG 2000": "jp2", "PPM": "ppm",
    "MP4": "mp4", "MOV, ProRes": "mov", "MKV": "mkv", "MKV, FFV1": "mkv", "WebM, VP9": "webm", "WebM, VP8": "webm",
    "AVI, MPEG-4": "avi", "AVI, MJPEG": "avi", "MPEG-TS": "ts", "MPEG-PS": "mpg", "FLV": "flv", "ASF": "wmv",
}  # fmt: skip
MIN_SIZE = 32


@pytest.fixture(scope="module")
def num_files(request):
    return max(NUM_FEW, (request.config.getoption("--fuzz") or 0) // len(SUFFIXES))


def write_mutations(kinds, photo, folder, num_files):
    """Write valid and mutated files of each kind; return their paths."""
    folder.mkdir()
    paths = []
    for kind, make in kinds.items():
        original = make(photo)
        contents = [original, *(mutated(kind, original, number) for number in range(num_files))]
        for number, content in enumerate(contents):
            path = folder / f"{list(SUFFIXES).index(kind):02}-{number:06}.{SUFFIXES[kind]}"
            path.write_bytes(content)
            paths.append(path)
    return paths


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((48, MIN_SIZE))


@pytest.fixture(scope="module")
def images(photo, num_files, tmp_path_factory):
    return write_mutations(IMAGES, photo, tmp_path_factory.mktemp("images") / "all", num_files)


@pytest.fixture(scope="module")
def videos(photo, num_files, tmp_path_factory):
    return write_mutations(VIDEOS, photo, tmp_path_factory.mktemp("videos") / "all", num_files)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of untrained tokenizers of images and of clips."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: save_tokenizer(folder / name, 0, frames) for name, frames in (("images", 1), ("clips", 4))}


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_pack_packs_or_lists_every_mutated_file(kind, request, tmp_path):
    """Each file is packed and can be read again, or `damaged.txt` names it."""
    paths = request.getfixturevalue(kind)
    pack = pack_images if kind == "images" else pack_videos
    report = pack(str(paths[0].parent), str(tmp_path), PackOptions(num_workers=0, min_frames=1))
    packed = {key.split("_", 1)[1] for shard in report.manifest.shards for key in shard.keys}
    listed = {Path(line.split(": ")[0]).stem for line in report.damaged_files}
    assert len(report.damaged_files) == len(listed)
    assert packed | listed == {path.stem for path in paths}
    assert not packed & listed
    assert inspect_shards(str(tmp_path)).errors == []


def test_stream_reads_or_skips_every_mutated_image(images, tmp_path):
    """A shard made elsewhere contains the mutated files as they are."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in images:
            tar.add(path, path.name)
    index_shards(str(tmp_path))
    manifest = read_manifest(str(tmp_path))
    assert manifest.num_samples == sum(path.stat().st_size > 0 for path in images)
    data_config = config.DataConfig(interleave=1, shuffle_block_size=8)
    skipped = SkippedSamples(limit=len(images))
    source = ImageSource(manifest, data_config, MIN_SIZE)
    stream = training_batches(source, data_config, batch_size=8, rank=0, world_size=1, seed=0, skipped=skipped)
    read = {key for batch in islice(stream, manifest.num_samples // 8 + 1) for key in batch.keys}
    named = {line.split(": ")[1] for line in skipped.samples}
    assert read | named == {path.stem for path in images if path.stat().st_size > 0}


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_compress_writes_or_names_every_mutated_file(kind, request, tokenizers, tmp_path):
    paths = request.getfixturevalue(kind)
    destination = tmp_path / "out.bsq"
    for path in paths:
        destination.unlink(missing_ok=True)
        message = ""
        try:
            compress_file(tokenizers["images" if kind == "images" else "clips"], str(path), str(destination))
        except ValueError as error:
            message = str(error)
        assert path.name in message if message else destination.read_bytes().startswith(b"BSQ1")


def test_service_responds_to_every_mutated_file(images, videos, tokenizers, tmp_path):
    """A file that cannot be read is an error of the request (4xx), never of the service (500)."""
    models = {"images": tokenizers["images"], **save_video_models(tmp_path)}
    settings = Settings(models=models, limits=Limits(max_pixels=10_000, request_timeout_s=60), authentication=False)
    app = make_app(settings, make_replicas(settings))
    with TestClient(app, "http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        wait_until_loaded(client)
        for path in [*images, *videos]:
            model = "images" if path in images else "clips"
            response = client.post("/v1/compress", params={"model": model}, content=path.read_bytes())
            assert response.status_code in (200, 400, 413, 415, 422), (path.name, response.text)
