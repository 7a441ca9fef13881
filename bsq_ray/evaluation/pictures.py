"""Pictures of reconstructions beside their originals: the best, the median and the worst."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_KEPT = 64
_TILE, _GAP, _CAPTION = 192, 6, 30


@dataclass(frozen=True)
class Comparison:
    """One image three ways.

    Attributes:
        key: name of the sample.
        pixels_3CHW: uint8: original, model, mean colours.
        lpips, psnr: of the model and of the mean colours.
    """

    key: str
    pixels_3CHW: np.ndarray
    lpips: list[float]
    psnr: list[float]


def pick(comparisons: list[Comparison], count: int = _KEPT) -> list[Comparison]:
    """At most `count` of them, evenly spread from the best to the worst LPIPS of the model, sorted."""
    ranked = sorted(comparisons, key=lambda c: (c.lpips[0], c.key))
    if len(ranked) <= count:
        return ranked
    return [ranked[place] for place in np.linspace(0, len(ranked) - 1, count).round().astype(int)]


def draw(comparisons: list[Comparison], columns: int = 6) -> bytes:
    """PNG: columns from the best to the worst; rows are original, model, and mean colours at the same bits."""
    shown = pick(comparisons, columns)
    width = len(shown) * (_TILE + _GAP) + _GAP
    height = 3 * (_TILE + _GAP) + _GAP + _CAPTION
    sheet = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, comparison in enumerate(shown):
        left = _GAP + column * (_TILE + _GAP)
        role = {0: "best", len(shown) - 1: "worst", len(shown) // 2: "median"}.get(column, "")
        caption = f"{role} LPIPS {comparison.lpips[0]:.3f} · {comparison.psnr[0]:.1f} dB".strip()
        canvas.text((left, 8), caption, fill="black", font=font)
        for row, pixels_CHW in enumerate(comparison.pixels_3CHW):
            tile = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
            # Enlarged without smoothing, so that what is seen is what the codec made.
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            sheet.paste(tile.resize((_TILE, _TILE), method), (left, _CAPTION + _GAP + row * (_TILE + _GAP)))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
