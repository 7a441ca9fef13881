"""Files that a GPU has written decode on a CPU to the same bytes, and the other way round."""

import numpy as np
import pytest
import torch
from small_codecs import save_clip_codec, save_codec

from bsq_ray import Codec

pytestmark = pytest.mark.gpu
DEVICE_PAIRS = {"gpu to cpu": (True, False), "cpu to gpu": (False, True), "gpu to gpu": (True, True)}


def codecs(folder, gpu, devices, **options):
    """The one that writes and the one that reads."""
    return [
        Codec.from_pretrained(folder, device=str(gpu) if on_gpu else "cpu", **options)
        for on_gpu in DEVICE_PAIRS[devices]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_codec(tmp_path_factory.mktemp("codec") / "prior")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip_codec(tmp_path_factory.mktemp("codec") / "clips")


def _resized_photos(photos):
    return [photos[0].resize((150, 100)), photos[5].resize((320, 213)), photos[9].resize((33, 64))]


@pytest.mark.parametrize("devices", DEVICE_PAIRS)
def test_codec_image_bytes_match_across_devices(devices, gpu, folder, photos):
    writer, reader = codecs(folder, gpu, devices)
    own = Codec.from_pretrained(folder, device=str(gpu) if DEVICE_PAIRS[devices][0] else "cpu", batch_size=3)
    for photo in _resized_photos(photos):
        data = writer.compress(photo).data
        read = np.asarray(reader.decompress(data))
        assert read.shape == (photo.height, photo.width, 3)
        assert np.array_equal(read, np.asarray(own.decompress(data))), "decoded in batches of another size"


@pytest.mark.parametrize("devices", DEVICE_PAIRS)
def test_codec_clip_bytes_match_across_devices(devices, gpu, clip_folder, photos):
    writer, reader = codecs(clip_folder, gpu, devices)
    frames = [np.asarray(photos[0].resize((48, 32)).rotate(3 * turn)) for turn in range(6)]
    data = writer.compress_clip(frames, 25).data
    for read, own in zip(reader.decompress_clip(data), writer.decompress_clip(data), strict=True):
        assert np.array_equal(read, own)


def test_codec_fp32_pixels_differ_by_at_most_one_level(gpu, folder, photos):
    writer, reader = codecs(folder, gpu, "cpu to gpu", decode_dtype=torch.float32)
    data = writer.compress(photos[0]).data
    difference = np.asarray(reader.decompress(data)).astype(int) - np.asarray(writer.decompress(data))
    assert np.abs(difference).max() <= 1
