"""Files that a GPU has written decode on a CPU to the same bytes, and the other way round."""

import numpy as np
import pytest
import torch
from small_codecs import save_clip_codec, save_codec

from bsq_ray import Codec

pytestmark = pytest.mark.gpu
WAYS = {"gpu to cpu": (True, False), "cpu to gpu": (False, True), "gpu to gpu": (True, True)}


def codecs(folder, gpu, way, **options):
    """The one that writes and the one that reads."""
    return [Codec.from_pretrained(folder, device=str(gpu) if on_gpu else "cpu", **options) for on_gpu in WAYS[way]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_codec(tmp_path_factory.mktemp("codec") / "prior")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip_codec(tmp_path_factory.mktemp("codec") / "clips")


def _sizes(photos):
    return [photos[0].resize((150, 100)), photos[5].resize((320, 213)), photos[9].resize((33, 64))]


@pytest.mark.parametrize("way", WAYS)
def test_an_image_decodes_to_the_same_bytes_on_both(way, gpu, folder, photos):
    writer, reader = codecs(folder, gpu, way)
    own = Codec.from_pretrained(folder, device=str(gpu) if WAYS[way][0] else "cpu", batch=3)
    for photo in _sizes(photos):
        data = writer.compress(photo).data
        read = np.asarray(reader.decompress(data))
        assert read.shape == (photo.height, photo.width, 3)
        assert np.array_equal(read, np.asarray(own.decompress(data))), "whoever wrote it, in batches of another size"


@pytest.mark.parametrize("way", WAYS)
def test_a_clip_decodes_to_the_same_bytes_on_both(way, gpu, clip_folder, photos):
    writer, reader = codecs(clip_folder, gpu, way)
    frames = [np.asarray(photos[0].resize((48, 32)).rotate(3 * turn)) for turn in range(6)]
    data = writer.compress_clip(frames, 25).data
    for read, own in zip(reader.decompress_clip(data), writer.decompress_clip(data), strict=True):
        assert np.array_equal(read, own)


def test_in_fp32_pixels_differ_by_a_level_at_most(gpu, folder, photos):
    writer, reader = codecs(folder, gpu, "cpu to gpu", arithmetic=torch.float32)
    data = writer.compress(photos[0]).data
    difference = np.asarray(reader.decompress(data)).astype(int) - np.asarray(writer.decompress(data))
    assert np.abs(difference).max() <= 1
