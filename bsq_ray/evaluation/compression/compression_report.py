"""What a comparison of codecs looks like: a Markdown table, curves and a sheet of pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.compression.rate_distortion import METRICS, Curves

_DIGITS = {"bits_per_pixel": 4, "psnr": 2, "ms_ssim": 4, "lpips": 4, "encode_seconds": 2, "decode_seconds": 2}
_TITLES = {"psnr": "PSNR, dB (higher is better)", "ms_ssim": "MS-SSIM (higher)", "lpips": "LPIPS, alex (lower)"}
_TILE, _GAP, _CAPTION = 256, 6, 20


def compression_markdown(results: dict[str, Any]) -> str:
    """Every codec at our rate, and BD-rates."""
    anchor, rates = results["anchor"], results["bd_rate"]
    lines = [
        "| at our rate | bits/pixel | PSNR | MS-SSIM | LPIPS | encode s | decode s "
        f"| BD-rate (PSNR) against {anchor} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for codec, row in results["at_our_rate"].items():
        bd_rate = rates.get(codec)
        last = "–" if bd_rate is None else f"{bd_rate:+.1f} %"
        if row is None:
            lines.append(f"| {codec} | not within its range | | | | | | {last} |")
            continue
        cells = [f"{row[name]:.{digits}f}" for name, digits in _DIGITS.items()]
        lines.append(f"| {codec} | {' | '.join(cells)} | {last} |")
    lines += [
        "",
        f"Means over {results['items']} {results['kind']} of {results['set']}{_frame_limit_text(results)}; sizes are "
        f"those of whole files, headers included. Times with {results['workers'] or 1} process(es) at work.",
        f"BD-rates are means over {results['kind']}.",
    ]
    if results["prior_saves"] is not None:
        lines.append(f"The prior saves {results['prior_saves']:.1%} of the raw files.")
    return "\n".join(lines)


def _frame_limit_text(results: dict[str, Any]) -> str:
    if results["kind"] == "images":
        return ""
    return f", at most {results['frames']} frames each" if results["frames"] else ", all frames"


def plot_curves(curves: Curves, highlighted: Sequence[str]) -> bytes:
    """PNG: one plot for each metric over the rate; `ours` are the codecs to stand out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 4.6), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for codec, rows in curves.items():
            x, y = [row["bits_per_pixel"] for row in rows], [row[metric] for row in rows]
            axis.plot(
                x, y, "*-" if codec in highlighted else "o-", markersize=14 if codec in highlighted else 4, label=codec
            )
        axis.set(xscale="log", xlabel="bits per pixel", title=_TITLES[metric])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xticks(_ticks(curves))
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=90)
    plt.close(figure)
    return png.getvalue()


def _ticks(curves: Curves) -> list[float]:
    rates = [row["bits_per_pixel"] for rows in curves.values() for row in rows]
    steps = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    return [step for step in steps if min(rates) / 1.3 <= step <= max(rates) * 1.3]


def render_examples(examples: Sequence[dict[str, np.ndarray]]) -> bytes:
    """PNG: a column for each image or clip, a named row for the original and each codec that is pictured.

    Args:
        pictures: uint8 (H, W, 3) by what is said of it.
    """
    columns = []
    for example in examples:
        tiles = {name: Image.fromarray(pixels) for name, pixels in example.items()}
        columns.append({name: _fit_to_tile(tile) for name, tile in tiles.items()})
    rows = [max(list(column.values())[place].height for column in columns) for place in range(len(columns[0]))]
    width = len(columns) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(rows) + len(rows) * (_CAPTION + _GAP) + _GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for x, column in enumerate(columns):
        top = _GAP
        for (name, tile), height in zip(column.items(), rows, strict=True):
            left = _GAP + x * (_TILE + _GAP)
            canvas.text((left, top + 2), name, fill="black", font=font)
            sheet.paste(tile, (left, top + _CAPTION))
            top += height + _CAPTION + _GAP
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def _fit_to_tile(tile: Image.Image) -> Image.Image:
    return tile.resize((_TILE, round(tile.height * _TILE / tile.width)), Image.Resampling.LANCZOS)
