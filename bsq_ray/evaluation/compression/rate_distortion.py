"""Rate-distortion points and their summaries: mean curves, metrics at one rate, BD-rates."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bsq_ray.metrics.lpips import MIN_SIDE
from bsq_ray.metrics.ssim import MS_SSIM_SIDE

METRICS = ("psnr", "ms_ssim", "lpips")
# Smallest height and width for which a metric is defined.
MIN_SIDES = {"psnr": 1, "ms_ssim": MS_SSIM_SIDE + 1, "lpips": MIN_SIDE["alex"]}
Row = dict[str, float]
# Mean points of each codec by its name, with ascending rates.
Curves = dict[str, list[Row]]
# Minimum number of points of a curve for a BD-rate.
_MIN_POINTS = 4


@dataclass(frozen=True)
class Point:
    """One image or clip, coded by one codec at one quality.

    Attributes:
        codec: name of the codec.
        quality: quality setting of the codec.
        bits_per_pixel: of the whole file, headers included; for a clip, over the pixels of all its frames.
        metrics: PSNR in dB, and MS-SSIM and LPIPS (alex) if the image is large enough for them.
        encode_seconds, decode_seconds: for the whole image or clip.
    """

    codec: str
    quality: float
    bits_per_pixel: float
    metrics: dict[str, float]
    encode_seconds: float
    decode_seconds: float


def mean_curves(points_by_item: Mapping[str, Sequence[Point]]) -> Curves:
    """Return the mean over items of each codec at each quality; that of a metric over the items that have it."""
    grouped: dict[str, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for points in points_by_item.values():
        for point in points:
            grouped[point.codec][point.quality].append(point)
    curves = {}
    for codec, by_quality in grouped.items():
        rows = [
            {
                "quality": quality,
                "bits_per_pixel": float(np.mean([p.bits_per_pixel for p in points])),
                **_mean_metrics(points),
                "encode_seconds": float(np.mean([p.encode_seconds for p in points])),
                "decode_seconds": float(np.mean([p.decode_seconds for p in points])),
            }
            for quality, points in by_quality.items()
        ]
        curves[codec] = sorted(rows, key=lambda row: row["bits_per_pixel"])
    return curves


def _mean_metrics(points: Sequence[Point]) -> dict[str, float]:
    values = {name: [point.metrics[name] for point in points if name in point.metrics] for name in METRICS}
    return {name: float(np.mean(each)) for name, each in values.items() if each}


def interpolate_at_rate(curve: Sequence[Row], rate: float) -> Row | None:
    """Interpolate the metrics of a codec at a rate, linearly in the logarithm of the rate.

    Returns:
        The metrics; the point itself if the codec has only one; None if the rate is outside the measured range.
    """
    if len(curve) == 1:
        return curve[0]
    logs = np.log([row["bits_per_pixel"] for row in curve])
    if not logs[0] <= math.log(rate) <= logs[-1]:
        return None
    names = [name for name in (*METRICS, "encode_seconds", "decode_seconds") if name in curve[0]]
    row = {name: float(np.interp(math.log(rate), logs, [row[name] for row in curve])) for name in names}
    return {"bits_per_pixel": rate} | row


def mean_bd_rates(points_by_item: Mapping[str, Sequence[Point]], anchor: str) -> dict[str, float | None]:
    """Return the mean BD-rate over items, see `bd_rates`; items without a BD-rate are excluded.

    The BD-rate of mean curves would depend on how a codec distributes bits among items: at equal PSNR, at equal rate,
    or, as most do, with equal quantizers.
    """
    rates_by_codec: dict[str, list[float | None]] = defaultdict(list)
    for name, points in points_by_item.items():
        for codec, bd_rate in bd_rates(mean_curves({name: points}), anchor).items():
            rates_by_codec[codec].append(bd_rate)
    defined = {codec: [bd_rate for bd_rate in each if bd_rate is not None] for codec, each in rates_by_codec.items()}
    return {codec: float(np.mean(each)) if each else None for codec, each in defined.items()}


def bd_rates(curves: Curves, anchor: str) -> dict[str, float | None]:
    """Return the difference in bits at equal PSNR, percent of the anchor's bits, for codecs with a curve.

    Negative values are savings. Bjøntegaard's difference (VCEG-M33) with Akima interpolation over the common PSNR range
    (package `bjontegaard`); None where the curves have no common range.
    """
    import bjontegaard

    def pareto_front(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        # Where a higher rate has a lower PSNR, the curve is not monotonic; only its Pareto front counts.
        front: list[Row] = []
        for row in rows:
            if not front or (row["psnr"] > front[-1]["psnr"] and row["bits_per_pixel"] > front[-1]["bits_per_pixel"]):
                front.append(row)
        return [row["bits_per_pixel"] for row in front], [row["psnr"] for row in front]

    anchor_curve = pareto_front(curves[anchor])
    rates: dict[str, float | None] = {}
    for codec, rows in curves.items():
        codec_curve = pareto_front(rows)
        if codec == anchor or len(rows) < _MIN_POINTS:
            continue
        low, high = max(anchor_curve[1][0], codec_curve[1][0]), min(anchor_curve[1][-1], codec_curve[1][-1])
        if low >= high or min(len(anchor_curve[0]), len(codec_curve[0])) < _MIN_POINTS:
            rates[codec] = None
            continue
        with warnings.catch_warnings():
            # The package warns about a small common range, which is visible in the plot.
            warnings.simplefilter("ignore")
            bd_rate = bjontegaard.bd_rate(
                *anchor_curve, *codec_curve, method="akima", require_matching_points=False, min_overlap=0
            )
            rates[codec] = float(bd_rate)
    return rates
