"""Report of a comparison of codecs: a Markdown table, rate-distortion curves and example images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.compression.distortion import MIN_SIDES
from bsq_ray.evaluation.compression.rate_distortion import Curves, Row
from bsq_ray.evaluation.plots.image_encoding import encode_png

_DIGITS = {
    "bits_per_pixel": 4, "psnr": 2, "ms_ssim": 4, "lpips": 4, "dists": 4, "encode_seconds": 2, "decode_seconds": 2
}  # fmt: skip
_TITLES = {
    "psnr": "PSNR, dB (higher is better)",
    "ms_ssim": "MS-SSIM (higher)",
    "lpips": "LPIPS, alex (lower)",
    "dists": "DISTS (lower)",
}
_NAMES = {
    "bits_per_pixel": "bits/pixel", "psnr": "PSNR", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "dists": "DISTS",
    "encode_seconds": "encode s", "decode_seconds": "decode s",
}  # fmt: skip
_TILE, _GAP, _CAPTION = 256, 6, 20


def compression_markdown(results: dict[str, Any]) -> str:
    """Return a table of every codec at our rate, for nested bits at each of their rates, and a table of BD-rates."""
    metrics: Sequence[str] = results["metrics"]
    columns = ("bits_per_pixel", *metrics, "encode_seconds", "decode_seconds")
    lines: list[str] = []
    for bits, rows in results["at_bits"].items():
        lines += [*_rate_table(f"at {bits} bits per token", rows, columns), ""]
    if not lines:
        lines += [*_rate_table("at our rate", results["at_our_rate"], columns), ""]
    if any(results["bd_rates"].values()):
        lines += [*_bd_rate_table(results), ""]
    lines += [
        f"Means over {results['num_items']} {results['kind']} of {results['dataset']}{_frame_limit_text(results)}. "
        f"Sizes are those of whole files, headers included. Concurrent processes: {results['workers'] or 1}.",
        f"BD-rates are means over {results['kind']}, of bits at equal quality; negative values are savings. "
        f"No overlap: the codec and {results['anchor']} have no quality in common.",
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
    lines += [f"Warning: {line}." for line in results["dataset_warnings"]]
    lines += [f"Ignored: {line}." for line in results.get("ignored", ())]
    return "\n".join(lines)


def _rate_table(title: str, rows: Mapping[str, Row | None], columns: Sequence[str]) -> list[str]:
    """Return the lines of a table with the metrics of each codec at one rate."""
    lines = [f"| {title} | {' | '.join(_NAMES[name] for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for codec, row in rows.items():
        if row is None:
            lines.append(f"| {codec} | not within its range |{' |' * (len(columns) - 1)}")
            continue
        cells = [f"{row[name]:.{_DIGITS[name]}f}" if name in row else "–" for name in columns]
        lines.append(f"| {codec} | {' | '.join(cells)} |")
    return lines


def _bd_rate_table(results: dict[str, Any]) -> list[str]:
    """Return the lines of a table with the BD-rate of each codec at equal values of each metric."""
    anchor, rates, num_items = results["anchor"], results["bd_rates"], results["num_items"]
    lines = [
        f"| BD-rate against {anchor} | {' | '.join(_NAMES[name] for name in rates)} |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for codec in results["curves"]:
        if any(codec in each for each in rates.values()):
            cells = [_format_bd_rate(each.get(codec), num_items) for each in rates.values()]
            lines.append(f"| {codec} | {' | '.join(cells)} |")
    return lines


def _format_bd_rate(rate: Mapping[str, Any] | None, num_items: int) -> str:
    if rate is None:
        return "–"
    if rate["percent"] is None:
        return "no overlap"
    subset = f" ({rate['num_items']} of {num_items})" if rate["num_items"] < num_items else ""
    return f"{rate['percent']:+.1f} %{subset}"


def _frame_limit_text(results: dict[str, Any]) -> str:
    if results["kind"] == "images":
        return ""
    return f", at most {results['max_frames']} frames each" if results["max_frames"] else ", all frames"


def plot_curves(curves: Curves, metrics: Sequence[str], highlighted: Sequence[str]) -> bytes:
    """Return a PNG file with one plot per metric over the rate; the codecs in `highlighted` have star markers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, [axes] = plt.subplots(1, len(metrics), figsize=(5 * len(metrics), 4.6), layout="constrained", squeeze=False)
    for axis, metric in zip(axes, metrics, strict=True):
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
