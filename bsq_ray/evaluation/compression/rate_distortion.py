"""Points of rate and distortion, and what is made of them: mean curves, figures at one rate, BD-rates."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("psnr", "ms_ssim", "lpips")
Row = dict[str, float]
# A codec's mean points, rates ascending, by its name.
Curves = dict[str, list[Row]]
# Points that a curve needs for a BD-rate.
_MIN_POINTS = 4


@dataclass(frozen=True)
class Point:
    """One image or clip in one codec at one quality.

    Attributes:
        bits_per_pixel: of the whole file, headers included; of a clip, over the pixels of all its frames.
        figures: PSNR in dB, MS-SSIM, LPIPS (alex).
        encode_seconds, decode_seconds: of the whole image or clip.
    """

    codec: str
    quality: float
    bits_per_pixel: float
    metrics: dict[str, float]
    encode_seconds: float
    decode_seconds: float


def mean_curves(points_by_item: Mapping[str, Sequence[Point]]) -> Curves:
    """Mean over items of each codec at each quality."""
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
                **{name: float(np.mean([p.metrics[name] for p in points])) for name in METRICS},
                "encode_seconds": float(np.mean([p.encode_seconds for p in points])),
                "decode_seconds": float(np.mean([p.decode_seconds for p in points])),
            }
            for quality, points in by_quality.items()
        ]
        curves[codec] = sorted(rows, key=lambda row: row["bits_per_pixel"])
    return curves


def interpolate_at_rate(curve: Sequence[Row], rate: float) -> Row | None:
    """Figures of a codec at a rate, by the logarithm of the rate between its neighbours.

    Returns:
        None where the rate is outside what was measured; the point itself of a codec that has only one.
    """
    if len(curve) == 1:
        return curve[0]
    logs = np.log([row["bits_per_pixel"] for row in curve])
    if not logs[0] <= math.log(rate) <= logs[-1]:
        return None
    names = (*METRICS, "encode_seconds", "decode_seconds")
    row = {name: float(np.interp(math.log(rate), logs, [row[name] for row in curve])) for name in names}
    return {"bits_per_pixel": rate} | row


def mean_bd_rates(points_by_item: Mapping[str, Sequence[Point]], anchor: str) -> dict[str, float | None]:
    """Mean over items of the BD-rates of each, see `bd_rates`, where they have one.

    Of mean curves it would depend on how a codec shares bits out among items: at one PSNR for all, at one rate for all,
    or, as most do, at one quantiser.
    """
    rates_by_codec: dict[str, list[float | None]] = defaultdict(list)
    for name, points in points_by_item.items():
        for codec, bd_rate in bd_rates(mean_curves({name: points}), anchor).items():
            rates_by_codec[codec].append(bd_rate)
    defined = {codec: [bd_rate for bd_rate in each if bd_rate is not None] for codec, each in rates_by_codec.items()}
    return {codec: float(np.mean(each)) if each else None for codec, each in defined.items()}


def bd_rates(curves: Curves, anchor: str) -> dict[str, float | None]:
    """Bits saved (negative) or wasted at equal PSNR, in percent of the anchor's, for codecs with a curve.

    Bjøntegaard's difference (VCEG-M33) by Akima interpolation, over the PSNRs that both curves reach (package
    `bjontegaard`); None where they reach none.
    """
    import bjontegaard

    def pareto_front(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        # Where a higher rate was worse, the curve goes back; only its front counts.
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
            # It warns of a small common range, which the plot shows.
            warnings.simplefilter("ignore")
            bd_rate = bjontegaard.bd_rate(
                *anchor_curve, *codec_curve, method="akima", require_matching_points=False, min_overlap=0
            )
            rates[codec] = float(bd_rate)
    return rates
