"""Pictures of reconstructions beside their originals: from the best over the median to the worst."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.metrics.fid import sampling_ranks

_MAX_EXAMPLES, _MAX_EXAMPLE_BYTES = 64, 256 * 2**20
_TILE, _GAP, _CAPTION = 192, 6, 30


@dataclass(frozen=True)
class Comparison:
    """One image or clip three ways.

    Attributes:
        key: name of the sample.
        pixels: uint8 (3, 3, H, W) or (3, 3, T, H, W): original, model, mean colours.
        lpips, psnr: of the model and of the mean colours.
    """

    key: str
    pixels: np.ndarray
    lpips: list[float]
    psnr: list[float]


def subsample(comparisons: list[Comparison]) -> list[Comparison]:
    """The best, the worst, and a sample of the others: at most 66, the same ones for any number of workers."""
    if not comparisons:
        return comparisons
    num_kept = max(4, min(_MAX_EXAMPLES, _MAX_EXAMPLE_BYTES // comparisons[0].pixels.nbytes))
    if len(comparisons) <= num_kept:
        return comparisons
    ranked = sorted(comparisons, key=_sort_key)
    ranks_N = sampling_ranks([comparison.key for comparison in ranked])
    indices = {0, len(ranked) - 1, *np.argsort(ranks_N, kind="stable")[:num_kept].tolist()}
    return [ranked[place] for place in sorted(indices)]


def select_by_quantile(comparisons: list[Comparison], lpips_scores: list[float], columns: int) -> list[Comparison]:
    """Those nearest to evenly spaced quantiles of LPIPS, best first.

    Args:
        comparisons: the kept ones.
        scores: the model's LPIPS of all images, kept or not.
    """
    quantiles = np.quantile(lpips_scores, np.linspace(0, 1, columns), method="nearest")
    ranked = sorted(comparisons, key=_sort_key)
    nearest = (min(ranked, key=lambda c: abs(c.lpips[0] - quantile)) for quantile in quantiles)
    return list({comparison.key: comparison for comparison in nearest}.values())


def _sort_key(comparison: Comparison) -> tuple[float, str]:
    return comparison.lpips[0], comparison.key


def render_grid(comparisons: list[Comparison], lpips_scores: list[float], columns: int = 7) -> bytes:
    """PNG: columns from the best to the worst; rows are original, model, and mean colours at the same bits.

    An odd number of columns has the median in the middle.
    """
    selected = select_by_quantile(comparisons, lpips_scores, columns)
    [median] = select_by_quantile(selected, [float(np.quantile(lpips_scores, 0.5, method="nearest"))], 1)
    roles = {median.key: "median", selected[-1].key: "worst", selected[0].key: "best"}
    width = len(selected) * (_TILE + _GAP) + _GAP
    height = 3 * (_TILE + _GAP) + _GAP + _CAPTION
    sheet = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, comparison in enumerate(selected):
        left = _GAP + column * (_TILE + _GAP)
        caption = (
            f"{roles.get(comparison.key, '')} LPIPS {comparison.lpips[0]:.3f} · {comparison.psnr[0]:.1f} dB".strip()
        )
        canvas.text((left, 8), caption, fill="black", font=font)
        for row, pixels_CHW in enumerate(comparison.pixels):
            tile = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
            # Enlarged without smoothing, so that what is seen is what the codec made.
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            sheet.paste(tile.resize((_TILE, _TILE), method), (left, _CAPTION + _GAP + row * (_TILE + _GAP)))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
