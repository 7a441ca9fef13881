"""Plot reconstructed clips: strips of frames, and an animation of several clips side by side.

The rows are the original, the reconstruction, and the mean-color baseline at the same bit rate.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.plots.comparison_grid import Comparison, select_by_quantile
from bsq_ray.evaluation.plots.image_encoding import encode_animation, encode_png, image_from_pixels

_ROWS = ("original", "tokenizer", "mean colors")
# Pixels: side of a tile, gap between tiles, width of the row labels, height of the captions.
_TILE, _GAP, _LABEL, _CAPTION = 128, 4, 110, 24
_NUM_FRAMES, _NUM_CLIPS = 8, 5
# Browsers play animations with shorter frames more slowly.
_MIN_FRAME_MS = 20


def render_strips(comparisons: list[Comparison], lpips_scores: list[float]) -> bytes:
    """Return a PNG file with frames of the clips with best, median and worst LPIPS; time runs from left to right."""
    selected = select_by_quantile(comparisons, lpips_scores, 3)
    frames = _frame_indices(selected[0].pixels.shape[2])
    block_height = _CAPTION + 3 * (_TILE + _GAP) + _GAP
    strips = Image.new("RGB", (_LABEL + len(frames) * (_TILE + _GAP), len(selected) * block_height), "white")
    for index, comparison in enumerate(selected):
        tiles = [[row_3THW[:, frame] for frame in frames] for row_3THW in comparison.pixels]
        rank_name = ("best", "median", "worst")[index] if len(selected) == 3 else ""
        # The first caption is as wide as two tiles.
        captions = [f"{rank_name} clip: {_caption(comparison)}".strip(), "", *(f"frame {n + 1}" for n in frames[2:])]
        _paste_block(strips, index * block_height, tiles, captions)
    return encode_png(strips)


def render_animation(comparisons: list[Comparison], lpips_scores: list[float], fps: float) -> bytes:
    """Return an animated WebP file: clips side by side, best to worst LPIPS, at `fps` frames per second."""
    selected = select_by_quantile(comparisons, lpips_scores, _NUM_CLIPS)
    size = (_LABEL + len(selected) * (_TILE + _GAP), _CAPTION + 3 * (_TILE + _GAP))
    images = []
    for frame_index in range(selected[0].pixels.shape[2]):
        image = Image.new("RGB", size, "white")
        tiles = [[comparison.pixels[row][:, frame_index] for comparison in selected] for row in range(len(_ROWS))]
        _paste_block(image, 0, tiles, [f"LPIPS {comparison.lpips[0]:.3f}" for comparison in selected])
        images.append(image)
    return encode_animation(images, max(_MIN_FRAME_MS, round(1000 / fps)), quality=88)


def _frame_indices(num_frames: int) -> list[int]:
    """Return the indices of at most eight evenly spaced frames, including the first and the last."""
    return np.unique(np.linspace(0, num_frames - 1, _NUM_FRAMES).round().astype(int)).tolist()


def _caption(comparison: Comparison) -> str:
    return f"LPIPS {comparison.lpips[0]:.3f} · {comparison.psnr[0]:.1f} dB"


def _paste_block(target: Image.Image, top: int, tiles: list[list[np.ndarray]], captions: list[str]) -> None:
    """Paste rows of tiles (3, H, W) with a label left of each row and a caption above each column."""
    draw, font = ImageDraw.Draw(target), ImageFont.load_default(13)
    for column, caption in enumerate(captions):
        draw.text((_LABEL + column * (_TILE + _GAP), top + 5), caption, fill="black", font=font)
    for row, (label, row_tiles) in enumerate(zip(_ROWS, tiles, strict=True)):
        y = top + _CAPTION + row * (_TILE + _GAP)
        draw.text((6, y + _TILE // 2 - 8), label, fill="black", font=font)
        for column, pixels_3HW in enumerate(row_tiles):
            tile = image_from_pixels(pixels_3HW)
            # Nearest-neighbor upscaling: smoothing would hide the artifacts of the codec.
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            target.paste(tile.resize((_TILE, _TILE), method), (_LABEL + column * (_TILE + _GAP), y))
