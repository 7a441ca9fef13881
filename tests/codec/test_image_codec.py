"""Test images of any size and kind: the same bytes from every decoder, no seams, regions and previews."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from small_codecs import PRIOR_CONFIG, NoisyPrior
from small_models import save_tokenizer

from bsq_ray import Codec, Prior, Tokenizer
from bsq_ray.codec.tiles import as_grid, blend_tiles, split_tiles
from bsq_ray.models.prior import IncrementalDecoder


@pytest.fixture(scope="module")
def photo(photos):
    return photos[0].resize((150, 100))


@pytest.fixture(scope="module")
def data(codec, photo):
    return codec.compress(photo).data


def array(image):
    return np.asarray(image).astype(int)


_DECODE = """
import sys, torch
from bsq_ray import Codec
folder, source, out, threads, batch = sys.argv[1:]
torch.set_num_threads(int(threads))
codec = Codec.from_pretrained(folder, batch_size=int(batch))
open(out, "wb").write(codec.decompress(open(source, "rb").read()).tobytes())
"""


def test_decode_other_process_batch_and_threads_is_byte_exact(codec_folder, photos, tmp_path):
    """Other processes decode the same bytes, on an image of many groups of tiles."""
    photo = photos[0].resize((450, 300))
    eight = Codec.from_pretrained(codec_folder, batch_size=8)
    data = eight.compress(photo).data
    (tmp_path / "a.bsq").write_bytes(data)
    expected = eight.decompress(data).tobytes()
    for threads, batch in ((1, 1), (2, 1), (2, 7)):
        out = tmp_path / f"{threads}-{batch}"
        words = [sys.executable, "-c", _DECODE, codec_folder, tmp_path / "a.bsq", out, str(threads), str(batch)]
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        assert out.read_bytes() == expected


_COMPRESS_LARGE = """
import resource, sys
from PIL import Image
from bsq_ray import Codec
codec = Codec.from_pretrained(sys.argv[1], batch_size=64)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
codec.compress(Image.new("RGB", (2000, 128)))
image = Image.effect_noise((2000, 4000), 60).convert("RGB")
before = peak()
codec.compress(image)
print((peak() - before) / (2000 * 4000))
"""


def test_compress_large_image_needs_few_bytes_per_pixel(codec_folder):
    """Memory grows by less than 16 bytes per pixel: one row of tile groups is encoded at a time."""
    words = [sys.executable, "-c", _COMPRESS_LARGE, f"{codec_folder}/tokenizer"]
    output = subprocess.run(
        words, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert float(output.stdout) < 16


def test_compress_batch_size_does_not_change_raw_file(codec_folder, photo, data):
    for batch in (1, 5):
        assert Codec.from_pretrained(codec_folder, batch_size=batch).compress(photo).raw_bits > 0
    raw = [Codec.from_pretrained(f"{codec_folder}/tokenizer", batch_size=b).compress(photo).data for b in (1, 5)]
    assert raw[0] == raw[1]


def test_codec_bf16_prior_roundtrip(codec_folder, photo):
    """They are what fp32 makes of them, on both sides."""
    codecs = []
    for batch in (8, 1):
        codec = Codec.from_pretrained(codec_folder)
        rounded = Codec(codec.tokenizer, codec.prior.bfloat16(), batch)
        assert rounded.prior.start.dtype == torch.float32
        codecs.append(rounded)
    assert codecs[1].decompress(codecs[0].compress(photo).data).size == photo.size
    with torch.autocast("cpu", torch.bfloat16):
        assert codecs[1].decompress(codecs[0].compress(photo).data).size == photo.size


def test_decompress_logits_beyond_tolerance_raises(codec_folder, data):
    codec = Codec.from_pretrained(codec_folder)
    codec.prior = NoisyPrior(codec.prior, 0.3)
    with pytest.raises(
        ValueError, match="this machine's logits differ from the encoder's by more than the file allows"
    ):
        codec.decompress(data)
    codec.prior.noise = 2.0**-14 - 1e-6
    assert codec.decompress(data).size == (150, 100)


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (32, 32), (200, 40), (129, 257)])
def test_codec_any_image_size_roundtrip(codec, raw_codec, photos, size):
    photo = photos[1].resize(size)
    image = codec.decompress(codec.compress(photo).data)
    assert image.size == size
    raw = raw_codec.compress(photo)
    assert raw_codec.decompress(raw.data).tobytes() == image.tobytes(), "with and without a prior the pixels agree"
    assert raw.raw_bits <= 8 * len(raw.data)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_codec_any_image_mode_roundtrip(raw_codec, photo, mode):
    image = photo.convert("L").convert("I;16") if mode == "I;16" else photo.convert(mode)
    assert raw_codec.decompress(raw_codec.compress(image).data).size == photo.size


def test_compress_embedded_icc_profile_is_applied(raw_codec, photo, tmp_path):
    """A profile whose red and green primaries are swapped: conversion to sRGB swaps them back."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"XXXX", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"XXXX", b"gXYZ", 1)
    red, green, blue = photo.split()
    Image.merge("RGB", (green, red, blue)).save(tmp_path / "odd.png", icc_profile=swapped)
    with Image.open(tmp_path / "odd.png") as odd:
        coded = raw_codec.compress(odd).data
    there, here = (array(raw_codec.decompress(d)) for d in (coded, raw_codec.compress(photo).data))
    ignored = array(raw_codec.decompress(raw_codec.compress(Image.merge("RGB", (green, red, blue))).data))
    assert np.abs(there - here).mean() < 0.25 * np.abs(ignored - here).mean()


@pytest.mark.parametrize("region", [(0, 0, 150, 100), (10, 5, 40, 90), (100, 64, 101, 65), (33, 0, 150, 10)])
def test_decompress_region_matches_crop(codec, data, region):
    part = codec.decompress(data, region)
    assert part.tobytes() == codec.decompress(data).crop(region).tobytes()
    with pytest.raises(ValueError, match="is not inside the image"):
        codec.decompress(data, (0, 0, 151, 10))


def test_decompress_region_reads_only_its_groups(codec, photos):
    """The payload of the last group may be anything."""
    photo = photos[2].resize((300, 280))
    data = codec.compress(photo).data
    damaged = data[:-4] + bytes(4)
    assert codec.decompress(damaged, (0, 0, 60, 60)).tobytes() == codec.decompress(data, (0, 0, 60, 60)).tobytes()
    with pytest.raises(ValueError, match="group 8 does not match its checksum"):
        codec.decompress(damaged)


def test_decompress_large_image_in_blocks_is_identical(raw_codec, photos, monkeypatch):
    data = raw_codec.compress(photos[2].resize((300, 280))).data
    whole = raw_codec.decompress(data).tobytes()
    monkeypatch.setattr("bsq_ray.codec.pixel_codec._BLOCK_PIXELS", 70**2)
    assert raw_codec.decompress(data).tobytes() == whole


def test_preview_truncated_file_shows_available_tiles(codec, photos):
    photo = photos[2].resize((300, 280))
    data = codec.compress(photo).data
    whole = array(codec.decompress(data))
    image, share = codec.preview(data[: len(data) * 2 // 3])
    assert 0.2 < share < 0.8
    assert (array(image)[:90] == whole[:90]).all()
    assert (array(image)[-1] == 128).all()
    assert codec.preview(data)[1] == 1
    with pytest.raises(ValueError, match="header and index need"):
        codec.preview(data[:20])


def test_blend_tiles_has_no_visible_seams():
    """Each window decodes to its own brightness; across a seam the image changes in small steps."""
    windows = []

    def decode(bits_BNL):
        windows.append(len(bits_BNL))
        level_B = torch.arange(len(bits_BNL)) * 0.1 + 0.01 * len(windows)
        return level_B.view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 32, 32)

    pixels = blend_tiles(torch.zeros(2, 8, 12, 10, dtype=torch.bool), 4, 8, decode)
    assert pixels.shape == (3, 2, 64, 96)
    assert windows == [6, 4, 3, 2]
    assert pixels[0].diff(dim=-1).abs().max() < 0.09
    assert pixels.min() > 0


def test_split_tiles_and_tiles_to_grid_keep_positions(photo):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[:, None].expand(-1, 2, -1, -1)
    tiles = split_tiles(pixels, 32)
    assert tiles.shape == (4, 5, 3, 2, 32, 32)
    assert torch.equal(tiles[1, 2], pixels[..., 32:64, 64:96])
    assert torch.equal(tiles[3, 0][..., -1, :], pixels[..., -1, :32]), "the edge is repeated"
    grid = as_grid(torch.arange(2 * 3 * 32).view(2, 3, 32, 1), 2)
    assert grid.shape == (2, 8, 12, 1)
    assert grid[0, 4, 1, 0] == 3 * 32 + 1
    assert grid[1, 4, 1, 0] == 3 * 32 + 16 + 1


def test_decompress_wrong_model_or_version_raises(codec, raw_codec, data, photo, tmp_path):
    with pytest.raises(ValueError, match="was written with a prior"):
        raw_codec.decompress(data)
    with pytest.raises(ValueError, match="without a prior"):
        codec.decompress(raw_codec.compress(photo).data)
    other = Codec.from_pretrained(save_tokenizer(tmp_path / "other", 5))
    with pytest.raises(ValueError, match="was written with the models with key [0-9a-f]{4}, but these are tokenizer"):
        other.decompress(raw_codec.compress(photo).data)
    with pytest.raises(ValueError, match="format version 15"):
        codec.decompress(data[:4] + b"\x0f" + data[5:])
    with pytest.raises(ValueError, match="not a .bsq file"):
        codec.decompress(b"\x89PNG")


def test_codec_incompatible_models_raise(codec):
    with pytest.raises(ValueError, match="do not match"):
        Codec(codec.tokenizer, Prior(PRIOR_CONFIG.model_copy(update={"grid": (1, 2, 2)})))
    with pytest.raises(ValueError, match="load them from a model folder"):
        Codec(codec.tokenizer, Prior(PRIOR_CONFIG))
    assert codec.compress(Image.new("RGB", (8, 8))).data[:4] == b"BSQ1"


def test_codec_wrong_tokenizer_in_prior_folder_raises(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", 0)
    Prior(PRIOR_CONFIG.model_copy(update={"tokenizer": "a" * 64})).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="was trained on tokens of aaaaaaaaaaaa; put that tokenizer there"):
        Codec.from_pretrained(str(tmp_path))


def test_codec_reports_progress_and_timings(codec, photo):
    calls = []
    coded = codec.compress(photo, lambda *done: calls.append(done))
    assert calls[-1] == (2, 2)
    assert set(coded.timings_s) == {"tokenizer", "prior", "coder"}
    timings_s, calls = {}, []
    codec.decompress(coded.data, on_progress=lambda *done: calls.append(done), timings_s=timings_s)
    assert calls[-1] == (2, 2)
    assert set(timings_s) == {"tokenizer", "prior", "coder"}


@pytest.mark.parametrize("folder", ["", "/tokenizer"])
def test_codec_reports_progress_between_model_passes(codec_folder, photo, monkeypatch, folder):
    """With a prior and without; its passes are the tokens that it decodes."""
    events = []

    def record_calls(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: events.append(name) or function(*given))

    for name in ("encode", "decode"):
        record_calls(Tokenizer, name)
    record_calls(IncrementalDecoder, "next_features")
    # One pass for each tile, and one of the prior for a token of all tiles.
    codec = Codec.from_pretrained(codec_folder + folder, batch_size=100)
    codec._pixel_codec._batch_size = 1
    coded = codec.compress(photo, lambda *_: events.append("progress"))
    codec.decompress(coded.data, on_progress=lambda *_: events.append("progress"))
    passes = {"encode", "decode"} if folder else {"encode", "decode", "next_features"}
    assert set(events) == {"progress", *passes}
    assert all(events.count(name) > 10 for name in passes)
    assert not [pair for pair in pairwise(events) if "progress" not in pair]
