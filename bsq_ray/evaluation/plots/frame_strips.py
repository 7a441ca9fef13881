"""Plot reconstructed clips: strips of frames, and an animation of several clips side by side.

Rows are the original, the model, and mean colors at the same bit rate.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.plots.comparison_grid import Comparison, select_by_quantile
from bsq_ray.evaluation.plots.image_encoding import encode_animation, encode_png, image_from_pixels

_ROWS = ("original", "tokenizer", "mean colors")
_TILE, _GAP, _LABEL, _CAPTION = 128, 4, 110, 24
_NUM_FRAMES, _NUM_CLIPS = 8, 5
# Browsers slow down animations with shorter frames.
_MIN_FRAME_MS = 20


def render_strips(comparisons: list[Comparison], lpips_scores: list[float]) -> bytes:
    """Return a PNG file: frames of the best, the median and the worst clip, time from left to right."""
    selected = select_by_quantile(comparisons, lpips_scores, 3)
    frames = _frame_indices(selected[0].pixels.shape[2])
    block = _CAPTION + 3 * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (_LABEL + len(frames) * (_TILE + _GAP), len(selected) * block), "white")
    for number, comparison in enumerate(selected):
        tiles = [[row_3THW[:, frame] for frame in frames] for row_3THW in comparison.pixels]
        name = ("best", "median", "worst")[number] if len(selected) == 3 else ""
        # The first caption is as wide as two tiles.
        captions = [f"{name} clip: {_caption(comparison)}".strip(), "", *(f"frame {n + 1}" for n in frames[2:])]
        _paste_block(sheet, number * block, tiles, captions)
    return encode_png(sheet)


def render_animation(comparisons: list[Comparison], lpips_scores: list[float], fps: float) -> bytes:
    """Return an animated WebP file: clips side by side, from the best to the worst, at `fps` frames per second."""
    selected = select_by_quantile(comparisons, lpips_scores, _NUM_CLIPS)
    size = (_LABEL + len(selected) * (_TILE + _GAP), _CAPTION + 3 * (_TILE + _GAP))
    images = []
    for frame in range(selected[0].pixels.shape[2]):
        image = Image.new("RGB", size, "white")
        tiles = [[comparison.pixels[row][:, frame] for comparison in selected] for row in range(len(_ROWS))]
        _paste_block(image, 0, tiles, [f"LPIPS {comparison.lpips[0]:.3f}" for comparison in selected])
        images.append(image)
    return encode_animation(images, max(_MIN_FRAME_MS, round(1000 / fps)), quality=88)


def _frame_indices(frames: int) -> list[int]:
    """Return the indices of at most eight evenly spaced frames, including the first and the last."""
    return np.unique(np.linspace(0, frames - 1, _NUM_FRAMES).round().astype(int)).tolist()


def _caption(comparison: Comparison) -> str:
    return f"LPIPS {comparison.lpips[0]:.3f} · {comparison.psnr[0]:.1f} dB"


def _paste_block(sheet: Image.Image, top: int, tiles: list[list[np.ndarray]], captions: list[str]) -> None:
    """Paste rows of tiles (3, H, W) with a label left of each row and a caption above each column."""
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, caption in enumerate(captions):
        canvas.text((_LABEL + column * (_TILE + _GAP), top + 5), caption, fill="black", font=font)
    for row, (label, row_tiles) in enumerate(zip(_ROWS, tiles, strict=True)):
        y = top + _CAPTION + row * (_TILE + _GAP)
        canvas.text((6, y + _TILE // 2 - 8), label, fill="black", font=font)
        for column, pixels_3HW in enumerate(row_tiles):
            tile = image_from_pixels(pixels_3HW)
            # Enlarged without smoothing, which would hide the artifacts of the codec.
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            sheet.paste(tile.resize((_TILE, _TILE), method), (_LABEL + column * (_TILE + _GAP), y))
