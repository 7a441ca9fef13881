"""Rate-distortion curves: means, interpolation at a rate, BD-rates against an independent computation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import Akima1DInterpolator

from bsq_ray.evaluation.compression.rate_distortion import (
    MeanBDRate,
    Point,
    bd_rates,
    compare_at_point,
    interpolate_at_rate,
    mean_bd_rates,
    mean_curves,
)

RATES = [0.1, 0.2, 0.45, 0.8, 1.6]


def row(rate, psnr):
    metrics = {"psnr": psnr, "ms_ssim": psnr / 50, "lpips": 1 / psnr}
    return {"bits_per_pixel": rate, **metrics, "encode_seconds": rate, "decode_seconds": 2 * rate}


def curve(rates, psnrs):
    return [row(rate, psnr) for rate, psnr in zip(rates, psnrs, strict=True)]


def point(codec, quality, rate, psnr):
    return Point(codec, quality, rate, {"psnr": psnr, "ms_ssim": 0.9, "lpips": 0.1}, 1.0, 2.0)


def test_mean_curves_average_items_and_sort_by_rate():
    items = {
        "a": [point("A", 70, 1.0, 40), point("A", 10, 0.2, 30), point("B", 0, 0.3, 33)],
        "b": [point("A", 70, 2.0, 42), point("A", 10, 0.4, 20), point("B", 0, 0.5, 35)],
    }
    curves = mean_curves(items)
    assert [(r["quality"], r["bits_per_pixel"], r["psnr"]) for r in curves["A"]] == [
        (10, pytest.approx(0.3), 25),
        (70, 1.5, 41),
    ]
    assert curves["B"] == [
        {"quality": 0, "bits_per_pixel": 0.4, "psnr": 34, "ms_ssim": 0.9, "lpips": 0.1}
        | {"encode_seconds": 1.0, "decode_seconds": 2.0}
    ]


def test_interpolate_at_rate_is_linear_in_log_rate():
    """Between two points, metrics are linear in the logarithm of the rate; outside there is no value."""
    interpolated = interpolate_at_rate(curve([0.1, 0.4], [30, 34]), 0.2)
    assert interpolated["psnr"] == pytest.approx(32)
    assert interpolated["bits_per_pixel"] == 0.2
    assert interpolate_at_rate(curve([0.1, 0.4], [30, 34]), 0.05) is None
    assert interpolate_at_rate(curve([0.1, 0.4], [30, 34]), 0.5) is None
    assert interpolate_at_rate(curve([0.1], [30]), 0.5) == row(0.1, 30), "a codec with one point is shown as it is"


@settings(deadline=None, max_examples=20)
@given(st.floats(0.2, 5))
def test_bd_rate_of_scaled_rates_is_the_scale_factor(factor):
    """The same quality at a multiple of the anchor's rate gives that multiple as the BD-rate."""
    psnrs = [28, 30.5, 33, 35, 38]
    curves = {"anchor": curve(RATES, psnrs), "other": curve([factor * rate for rate in RATES], psnrs)}
    assert bd_rates(curves, "anchor") == {"other": pytest.approx(100 * (factor - 1), abs=0.01)}


def test_bd_rate_matches_numerical_integration():
    """The BD-rate equals a numerical integral over 200,000 steps, for curves of different numbers of points."""
    first, second = curve(RATES, [28, 31, 34, 36, 39]), curve([0.12, 0.2, 0.3, 0.7], [29, 32, 34.5, 38.5])
    at = np.linspace(29, 38.5, 200_001)
    curves = [
        Akima1DInterpolator([row["psnr"] for row in rows], np.log([row["bits_per_pixel"] for row in rows]))
        for rows in (first, second)
    ]
    expected = 100 * (np.exp((curves[1](at) - curves[0](at)).mean()) - 1)
    assert bd_rates({"a": first, "b": second}, "a")["b"] == pytest.approx(expected, abs=0.01)


# Values of a good codec, and of one that needs twice its rate, with the quality that the BD-rate is integrated over.
METRICS = {
    "psnr": ([28, 31, 34, 36, 39], lambda value: value),
    "ms_ssim": ([0.8, 0.9, 0.95, 0.98, 0.99], lambda value: -10 * np.log10(1 - value)),
    "lpips": ([0.5, 0.4, 0.25, 0.15, 0.1], lambda value: -value),
    "dists": ([0.3, 0.22, 0.15, 0.1, 0.06], lambda value: -value),
}


@pytest.mark.parametrize(("metric", "values", "quality"), [(name, *each) for name, each in METRICS.items()])
def test_bd_rate_of_each_metric_is_negative_for_savings(metric, values, quality):
    """Lower LPIPS and DISTS are better: a codec with half the rate at equal values has -50 %, for every metric."""

    def metric_curve(rates, values):
        return [{"bits_per_pixel": rate, metric: value} for rate, value in zip(rates, values, strict=True)]

    halved = [rate / 2 for rate in RATES]
    curves = {"anchor": metric_curve(RATES, values), "half": metric_curve(halved, values)}
    assert bd_rates(curves, "anchor", metric) == {"half": pytest.approx(-50, abs=0.01)}
    # Another slope: compare with an integral over the common range.
    other = [0.9 * value for value in values]
    curves["other"] = metric_curve(halved, other)
    qualities = [quality(np.array(each)) for each in (values, other)]
    at = np.linspace(max(q[0] for q in qualities), min(q[-1] for q in qualities), 200_001)
    logs = [Akima1DInterpolator(q, np.log(r))(at) for q, r in zip(qualities, (RATES, halved), strict=True)]
    expected = 100 * (np.exp((logs[1] - logs[0]).mean()) - 1)
    assert bd_rates(curves, "anchor", metric)["other"] == pytest.approx(expected, abs=0.01)


def test_bd_rate_of_lpips_uses_the_falling_part_of_a_curve():
    """A point with a higher rate and a higher, worse LPIPS does not count."""
    anchor = [
        {"bits_per_pixel": rate, "lpips": value} for rate, value in zip(RATES, [0.5, 0.4, 0.3, 0.2, 0.1], strict=True)
    ]
    folded = [*anchor[:2], {"bits_per_pixel": 0.3, "lpips": 0.45}, *anchor[2:]]
    assert bd_rates({"a": anchor, "folded": folded}, "a", "lpips") == {"folded": pytest.approx(0, abs=1e-6)}


def test_mean_bd_rate_counts_items_whose_curves_overlap():
    def points(codec, psnrs):
        return [point(codec, n, rate, psnr) for n, (rate, psnr) in enumerate(zip(RATES, psnrs, strict=True))]

    anchor, near, far = [28, 30, 33, 35, 38], [29, 31, 34, 36, 39], [58, 60, 63, 65, 68]
    items = {
        "x": points("A", anchor) + points("B", near) + points("C", far),
        "y": points("A", anchor) + points("B", far) + points("C", far),
    }
    rates = mean_bd_rates(items, "A")
    assert rates["B"].num_items == 1
    assert -50 < rates["B"].percent < 0
    assert rates["C"] == MeanBDRate(None, 0)
    assert mean_bd_rates(items, "A", "dists") == {}, "these points have no DISTS"


def test_compare_at_point_shows_models_with_equal_bits():
    """Standard codecs are interpolated at the rate; the model's own codecs are shown with as many bits per token."""
    curves = {
        "raw": [row(0.2, 30) | {"quality": 6}, row(0.4, 34) | {"quality": 12}],
        "prior": [row(0.1, 30) | {"quality": 6}, row(0.3, 34) | {"quality": 12}],
        "only all bits": [row(0.25, 34) | {"quality": 0}],
        "JPEG": [row(0.05, 26) | {"quality": 5}, row(0.2, 30) | {"quality": 50}],
    }
    rows = compare_at_point(curves, curves["prior"][0], ("raw", "prior", "only all bits"))
    assert [rows[name]["bits_per_pixel"] for name in curves] == [0.2, 0.1, 0.25, 0.1]
    assert rows["JPEG"]["psnr"] == pytest.approx(28)
    assert compare_at_point(curves, curves["prior"][1], ("raw", "prior"))["JPEG"] is None


def test_mean_bd_rate_is_independent_of_bit_allocation():
    """A codec with half the anchor's rate has the same BD-rate at equal qualities and at equal PSNR of both images."""
    easy, hard = [36, 39, 42, 45, 48], [20, 23, 26, 29, 32]
    anchors = {"easy": easy, "hard": hard}
    psnrs_by_item = {"easy": [37, 40, 43, 46], "hard": [21, 22, 25, 28]}
    items = {}
    for name, psnrs in anchors.items():
        log_rates = np.interp(psnrs_by_item[name], psnrs, np.log(RATES))
        points = [point("A", n, rate, psnr) for n, (rate, psnr) in enumerate(zip(RATES, psnrs, strict=True))]
        points += [point("B", n, rate / 2, psnr) for n, (rate, psnr) in enumerate(zip(RATES, psnrs, strict=True))]
        points += [
            point("C", n, np.exp(r) / 2, p) for n, (r, p) in enumerate(zip(log_rates, psnrs_by_item[name], strict=True))
        ]
        items[name] = points
    bd_rate_by_codec = mean_bd_rates(items, "A")
    assert bd_rate_by_codec["B"] == MeanBDRate(pytest.approx(-50, abs=0.01), 2)
    assert bd_rate_by_codec["C"] == MeanBDRate(pytest.approx(-50, abs=1), 2)


def test_bd_rate_without_common_range_is_none():
    """Codecs with one point have no BD-rate, and a codec without a common PSNR range has None."""
    curves = {
        "anchor": curve(RATES, [28, 30, 33, 35, 38]),
        "far better": curve(RATES, [48, 50, 53, 55, 58]),
        "one point": curve([0.3], [30]),
        "with a fold": curve([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9], [28, 30, 29.5, 33, 34, 36, 37]),
    }
    bd_rate_by_codec = bd_rates(curves, "anchor")
    assert bd_rate_by_codec.keys() == {"far better", "with a fold"}
    assert bd_rate_by_codec["far better"] is None
    assert -60 < bd_rate_by_codec["with a fold"] < 0
