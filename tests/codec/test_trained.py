"""Test properties that only trained models have, on held-out photos: file size, and no seams between tiles."""

import numpy as np
import pytest
import torch
from PIL import Image
from trained import random_crops, save_trained, train_tokenizer

from bsq_ray import Codec
from bsq_ray.codec import tiles
from bsq_ray.codec.container import read_container
from bsq_ray.metrics.border_steps import border_step_ratio
from bsq_ray.metrics.psnr import psnr


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory, photo_folders):
    photos = [Image.open(path).convert("RGB") for path in sorted(photo_folders[0].iterdir())]
    return save_trained(tmp_path_factory.mktemp("trained"), photos)


def test_payload_size_is_close_to_cross_entropy_and_side_info(trained_folder, photos):
    """Payloads are within half a percent of cross entropy plus side information."""
    codec = Codec.from_pretrained(trained_folder)
    for photo in photos[:2]:
        compressed = codec.compress(photo.resize((768, 512)))
        container = read_container(compressed.data, codec.token_format)
        payload_bits = 8 * sum(map(int, container.sizes_G))
        assert payload_bits == pytest.approx(compressed.cross_entropy_bits + compressed.side_info_bits, rel=0.005)
        assert compressed.cross_entropy_bits < 0.9 * compressed.raw_bits, "the prior has learned something"
        assert compressed.side_info_bits < 0.01 * compressed.cross_entropy_bits
        assert 8 * len(compressed.data) < 1.025 * compressed.cross_entropy_bits
    assert codec.decompress(compressed.data, (300, 200, 400, 300)).size == (100, 100)


@pytest.mark.parametrize("size", [(64, 64), (128, 128)])
def test_small_image_has_few_bytes_above_cross_entropy(trained_folder, photos, size):
    """All that is added to the cross entropy is 16 bytes and half a percent at most."""
    codec = Codec.from_pretrained(trained_folder)
    for photo in photos[:6]:
        compressed = codec.compress(photo.resize(size))
        assert len(compressed.data) - compressed.cross_entropy_bits / 8 < 16 + 0.005 * compressed.cross_entropy_bits / 8
        assert codec.decompress(compressed.data).size == size


@pytest.mark.slow
def test_nested_bits_are_better_than_cut_bits(photo_folders, photos):
    """At every smaller number of bits, held-out photos have a higher PSNR than with the cut tokens of another run."""
    train_photos = [Image.open(path).convert("RGB").resize((256, 256)) for path in sorted(photo_folders[0].iterdir())]
    keep = (6, 9, 12, 18)
    nested, ordinary = (train_tokenizer(train_photos, np.random.default_rng(0), 600, numbers) for numbers in (keep, ()))
    images_BCHW = random_crops([photo.resize((256, 256)) for photo in photos], 64, np.random.default_rng(1))

    def psnr_at(tokenizer, num_bits):
        return float(psnr(images_BCHW, tokenizer.decode_cut_bits(tokenizer.encode(images_BCHW).first(num_bits))).mean())

    values = {k: (psnr_at(nested, k), psnr_at(ordinary, k)) for k in keep}
    print(f"PSNR in dB of nested and of cut bits: {values}")
    assert all(values[k][0] > values[k][1] + 0.2 for k in keep[:-1])
    assert values[18][0] > values[18][1] - 1
    assert values[6][0] < values[9][0] < values[12][0] < values[18][0]


def test_blended_tile_borders_look_like_token_borders(trained_folder, photos, monkeypatch):
    """Blending removes seams that tiles decoded separately have: on average, and more than it adds on any photo."""
    codec = Codec.from_pretrained(f"{trained_folder}/tokenizer")
    files = [codec.compress(photo.resize((320, 256))).data for photo in photos[:6]]
    blended = [border_step_ratio(np.asarray(codec.decompress(data)), 64, 8) for data in files]
    monkeypatch.setattr(tiles, "_blend_weight", _unblended_weight)
    unblended = [border_step_ratio(np.asarray(codec.decompress(data)), 64, 8) for data in files]
    print(f"difference across borders of tiles over borders of tokens: {blended}, tiles decoded apart {unblended}")
    assert np.mean(blended) < 1.1
    removed = np.subtract(unblended, blended)
    assert removed.mean() > 0
    assert removed.max() > -2 * removed.min()


def _unblended_weight(tokens, side, patch, shift):
    return torch.full((tokens * patch,), float(shift == 0), dtype=torch.float64)
