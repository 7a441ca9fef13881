"""Rate-distortion points and their summaries: mean curves, metrics at one rate, BD-rates."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bsq_ray.evaluation.compression.distortion import LOWER_IS_BETTER, METRICS

Row = dict[str, float]
# Mean points of each codec by its name, with ascending rates.
Curves = dict[str, list[Row]]
# Minimum number of points of a curve for a BD-rate.
_MIN_POINTS = 3


@dataclass(frozen=True)
class Point:
    """One image or clip, coded by one codec at one quality.

    Attributes:
        codec: name of the codec.
        quality: quality setting of the codec; bits per token of BSQ with nested bits.
        bits_per_pixel: of the whole file, headers included; for a clip, over the pixels of all its frames.
        metrics: PSNR in dB, and MS-SSIM, LPIPS (alex) and DISTS if the image is large enough for them.
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


def compare_at_point(curves: Curves, point: Row, models: Sequence[str]) -> dict[str, Row | None]:
    """Return the metrics of every codec at the rate of a model's point.

    Args:
        curves: mean points of each codec.
        point: the point of a model.
        models: names of the model's own codecs: they are shown with as many bits as the point, or with their most, and
            not interpolated.
    """
    rate, quality = point["bits_per_pixel"], point["quality"]
    return {
        codec: next((row for row in rows if row["quality"] == quality), rows[-1])
        if codec in models
        else interpolate_at_rate(rows, rate)
        for codec, rows in curves.items()
    }


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


@dataclass(frozen=True)
class MeanBDRate:
    """Mean BD-rate of a codec over images or clips.

    Attributes:
        percent: difference in bits, percent of the anchor's bits; None if no item's curves overlap.
        num_items: number of items whose curves overlap.
    """

    percent: float | None
    num_items: int


def mean_bd_rates(
    points_by_item: Mapping[str, Sequence[Point]], anchor: str, metric: str = "psnr"
) -> dict[str, MeanBDRate]:
    """Return the mean BD-rate over the items whose curves overlap, see `bd_rates`.

    The BD-rate of mean curves would depend on how a codec distributes bits among items: at equal PSNR, at equal rate,
    or, as most do, with equal quantizers.
    """
    rates_by_codec: dict[str, list[float | None]] = defaultdict(list)
    for name, points in points_by_item.items():
        for codec, bd_rate in bd_rates(mean_curves({name: points}), anchor, metric).items():
            rates_by_codec[codec].append(bd_rate)
    defined = {codec: [bd_rate for bd_rate in each if bd_rate is not None] for codec, each in rates_by_codec.items()}
    return {codec: MeanBDRate(float(np.mean(each)) if each else None, len(each)) for codec, each in defined.items()}


def bd_rates(curves: Curves, anchor: str, metric: str = "psnr") -> dict[str, float | None]:
    """Return the difference in bits at equal quality, percent of the anchor's bits, for codecs with a curve.

    Negative values are savings, for every metric. Bjøntegaard's difference (VCEG-M33) with Akima interpolation over the
    common range of the metric (package `bjontegaard`): of PSNR, MS-SSIM in dB, and the negatives of LPIPS and DISTS.

    Returns:
        The BD-rates; None for a codec whose curve does not overlap with the anchor's. Codecs with too few points are
        excluded, and all codecs if the anchor has too few.
    """
    import bjontegaard

    fronts = {codec: _pareto_front(rows, metric) for codec, rows in curves.items()}
    fronts = {codec: front for codec, front in fronts.items() if len(front) >= _MIN_POINTS}
    if anchor not in fronts:
        return {}
    anchor_curve = _to_columns(fronts.pop(anchor))
    rates: dict[str, float | None] = {}
    for codec, front in fronts.items():
        codec_curve = _to_columns(front)
        low, high = max(anchor_curve[1][0], codec_curve[1][0]), min(anchor_curve[1][-1], codec_curve[1][-1])
        if low >= high:
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


def _pareto_front(rows: Sequence[Row], metric: str) -> list[tuple[float, float]]:
    """Return (rate, quality) of the points at which a higher rate has a higher quality, ascending.

    Elsewhere the curve is not monotonic, and has no rate at a quality.
    """
    front: list[tuple[float, float]] = []
    for row in rows:
        if metric not in row:
            continue
        rate, quality = row["bits_per_pixel"], _quality(row[metric], metric)
        if not front or (quality > front[-1][1] and rate > front[-1][0]):
            front.append((rate, quality))
    return front


def _quality(value: float, metric: str) -> float:
    """Map a metric to a value that grows with the quality, and about linearly with the logarithm of the rate."""
    if metric in LOWER_IS_BETTER:
        return -value
    # MS-SSIM approaches 1; 1e-10 stands for an identical image.
    return -10 * math.log10(max(1 - value, 1e-10)) if metric == "ms_ssim" else value


def _to_columns(front: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [rate for rate, _ in front], [quality for _, quality in front]
