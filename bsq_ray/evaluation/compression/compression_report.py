"""Report of a comparison of codecs: a Markdown table, rate-distortion curves and example images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.compression.rate_distortion import METRICS, MIN_SIDES, Curves
from bsq_ray.evaluation.plots.image_encoding import encode_png

_DIGITS = {"bits_per_pixel": 4, "psnr": 2, "ms_ssim": 4, "lpips": 4, "encode_seconds": 2, "decode_seconds": 2}
_TITLES = {"psnr": "PSNR, dB (higher is better)", "ms_ssim": "MS-SSIM (higher)", "lpips": "LPIPS, alex (lower)"}
_NAMES = {"ms_ssim": "MS-SSIM", "lpips": "LPIPS"}
_TILE, _GAP, _CAPTION = 256, 6, 20


def compression_markdown(results: dict[str, Any]) -> str:
    """Return a table of every codec at our rate, with its BD-rate."""
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
        cells = [f"{row[name]:.{digits}f}" if name in row else "–" for name, digits in _DIGITS.items()]
        lines.append(f"| {codec} | {' | '.join(cells)} | {last} |")
    lines += [
        "",
        f"Means over {results['num_items']} {results['kind']} of {results['dataset']}{_frame_limit_text(results)}. "
        f"Sizes are those of whole files, headers included. Concurrent processes: {results['workers'] or 1}.",
        f"BD-rates are means over {results['kind']}.",
    ]
    if results["prior_savings"] is not None:
        lines.append(f"The prior saves {results['prior_savings']:.1%} of the raw files.")
    if ratios := results.get("border_step_ratio"):
        lines.append(
            f"Steps between pixels across tile borders, relative to other borders of patches: {ratios['decoded']:.3f} "
            f"(originals {ratios['original']:.3f})."
        )
    for metric, items in results.get("undefined", {}).items():
        side = MIN_SIDES[metric]
        lines.append(
            f"{_NAMES[metric]} is not defined for {len(items)} of the {results['num_items']} {results['kind']}, whose "
            f"sides are below {side} pixels, such as {items[0]}; its means are over the others."
        )
    lines += [f"Ignored: {line}." for line in results.get("ignored", ())]
    return "\n".join(lines)


def _frame_limit_text(results: dict[str, Any]) -> str:
    if results["kind"] == "images":
        return ""
    return f", at most {results['max_frames']} frames each" if results["max_frames"] else ", all frames"


def plot_curves(curves: Curves, highlighted: Sequence[str]) -> bytes:
    """Return a PNG file with one plot per metric over the rate; the codecs in `highlighted` have star markers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(15, 4.6), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for codec, rows in curves.items():
            x, y = zip(*((row["bits_per_pixel"], row.get(metric, np.nan)) for row in rows), strict=True)
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
    """Return a PNG file with a column for each image or clip, and a captioned row for the original and each codec.

    Args:
        examples: for each column, uint8 pixels (H, W, 3) by caption.
    """
    columns = []
    for example in examples:
        tiles = {name: Image.fromarray(pixels) for name, pixels in example.items()}
        columns.append({name: _fit_to_tile(tile) for name, tile in tiles.items()})
    rows = [max(list(column.values())[row].height for column in columns) for row in range(len(columns[0]))]
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
    return encode_png(sheet)


def _fit_to_tile(tile: Image.Image) -> Image.Image:
    return tile.resize((_TILE, round(tile.height * _TILE / tile.width)), Image.Resampling.LANCZOS)
