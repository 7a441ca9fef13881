"""What only trained models show, on held-out photographs: the size of files, and that tiles leave no seams."""

import numpy as np
import pytest
import torch
from PIL import Image
from trained import save_trained

from bsq_ray import Codec
from bsq_ray.codec import tiles
from bsq_ray.codec.container import read_container


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photo_folders):
    photographs = [Image.open(path).convert("RGB") for path in sorted(photo_folders[0].iterdir())]
    return save_trained(tmp_path_factory.mktemp("trained"), photographs)


def test_payloads_are_within_half_a_percent_of_cross_entropy_and_side_information(trained, photos):
    codec = Codec.from_pretrained(trained)
    for photo in photos[:2]:
        coded = codec.compress(photo.resize((768, 512)))
        container = read_container(coded.data)
        written = 8 * sum(len(container.payload(n)) for n in range(len(container.index_GE)))
        assert written == pytest.approx(coded.cross_entropy_bits + coded.side_bits, rel=0.005)
        assert coded.cross_entropy_bits < 0.9 * coded.raw_bits, "it has learnt something"
        assert coded.side_bits < 0.03 * coded.cross_entropy_bits
    assert codec.decompress(coded.data, (300, 200, 400, 300)).size == (100, 100)


def jumps(pixels, tile):
    """Mean absolute difference of neighbours across the borders of tiles, over that everywhere else."""
    ratios = []
    for axis in (0, 1):
        step = np.abs(np.diff(pixels.astype(float), axis=axis)).mean(axis=(1 - axis, 2))
        border = np.zeros(len(step), bool)
        border[tile - 1 :: tile] = True
        # Next to other borders of tokens, which are no borders of tiles.
        token = np.zeros(len(step), bool)
        token[7::8] = True
        ratios.append(step[border].mean() / step[token & ~border].mean())
    return float(np.mean(ratios))


def test_borders_of_tiles_cannot_be_told_from_borders_of_tokens(trained, photos, monkeypatch):
    """Blending takes from every photograph's seams what tiles decoded apart have of them."""
    codec = Codec.from_pretrained(f"{trained}/tokenizer")
    coded = [codec.compress(photo.resize((320, 256))).data for photo in photos[:6]]
    blended = [jumps(np.asarray(codec.decompress(data)), 64) for data in coded]
    monkeypatch.setattr(tiles, "_weight", _tiles_alone)
    apart = [jumps(np.asarray(codec.decompress(data)), 64) for data in coded]
    print(f"difference across borders of tiles over borders of tokens: {blended}, tiles decoded apart {apart}")
    assert np.mean(blended) < 1.1
    assert np.mean(np.less(blended, apart)) > 0.8


def _tiles_alone(tokens, side, patch, shift):
    return torch.full((tokens * patch,), float(shift == 0), dtype=torch.float64)
