"""Plot a grid of originals and reconstructions, with columns from the best to the worst LPIPS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.plots.image_encoding import encode_png, image_from_pixels
from bsq_ray.metrics.fid import sampling_ranks

# Limits of the random subset: number of comparisons, and total size of their pixels.
_MAX_EXAMPLES, _MAX_TOTAL_BYTES = 64, 256 * 2**20
# Pixels: side of a tile, gap between tiles, height of the captions.
_TILE, _GAP, _CAPTION = 192, 6, 30


@dataclass(frozen=True)
class Comparison:
    """An original image or clip, the reconstruction of the model, and the mean-color baseline.

    Attributes:
        key: name of the sample.
        pixels: uint8 (3, 3, H, W) or (3, 3, T, H, W), in the order original, model, baseline.
        lpips, psnr: values of the model and of the baseline, in this order; PSNR in dB.
    """

    key: str
    pixels: np.ndarray
    lpips: list[float]
    psnr: list[float]


def subsample(comparisons: list[Comparison]) -> list[Comparison]:
    """Return the comparisons with the best and the worst LPIPS and a random subset, at most 66 in total.

    The random subset depends only on the keys, so it is the same for any number of workers.
    """
    if not comparisons:
        return comparisons
    num_kept = max(4, min(_MAX_EXAMPLES, _MAX_TOTAL_BYTES // comparisons[0].pixels.nbytes))
    if len(comparisons) <= num_kept:
        return comparisons
    ranked = sorted(comparisons, key=_sort_key)
    ranks_N = sampling_ranks([comparison.key for comparison in ranked])
    indices = {0, len(ranked) - 1, *np.argsort(ranks_N, kind="stable")[:num_kept].tolist()}
    return [ranked[index] for index in sorted(indices)]


def select_by_quantile(comparisons: list[Comparison], lpips_scores: list[float], num_columns: int) -> list[Comparison]:
    """Return the comparisons nearest to evenly spaced LPIPS quantiles, best first, without duplicates.

    Args:
        comparisons: candidates, a subset of the data set.
        lpips_scores: LPIPS of the model for every sample of the data set.
        num_columns: number of quantiles, including minimum and maximum.
    """
    quantiles = np.quantile(lpips_scores, np.linspace(0, 1, num_columns), method="nearest")
    ranked = sorted(comparisons, key=_sort_key)
    nearest = (min(ranked, key=lambda c: abs(c.lpips[0] - quantile)) for quantile in quantiles)
    return list({comparison.key: comparison for comparison in nearest}.values())


def _sort_key(comparison: Comparison) -> tuple[float, str]:
    return comparison.lpips[0], comparison.key


def render_grid(comparisons: list[Comparison], lpips_scores: list[float], num_columns: int = 7) -> bytes:
    """Return a PNG file with one column per sample, from the best to the worst LPIPS.

    The rows are original, model and baseline. With an odd number of columns, the median is in the middle.
    """
    selected = select_by_quantile(comparisons, lpips_scores, num_columns)
    # Of a list with one score, every quantile is that score.
    [median] = select_by_quantile(selected, [float(np.quantile(lpips_scores, 0.5, method="nearest"))], 1)
    rank_names = {median.key: "median", selected[-1].key: "worst", selected[0].key: "best"}
    width = len(selected) * (_TILE + _GAP) + _GAP
    height = 3 * (_TILE + _GAP) + _GAP + _CAPTION
    grid = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for column, comparison in enumerate(selected):
        left = _GAP + column * (_TILE + _GAP)
        rank_name = rank_names.get(comparison.key, "")
        caption = f"{rank_name} LPIPS {comparison.lpips[0]:.3f} · {comparison.psnr[0]:.1f} dB".strip()
        draw.text((left, 8), caption, fill="black", font=font)
        for row, pixels_CHW in enumerate(comparison.pixels):
            tile = image_from_pixels(pixels_CHW)
            # Nearest-neighbor upscaling: smoothing would hide the artifacts of the codec.
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            grid.paste(tile.resize((_TILE, _TILE), method), (left, _CAPTION + _GAP + row * (_TILE + _GAP)))
    return encode_png(grid)
