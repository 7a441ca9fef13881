"""The pictures of a sweep: rate against distortion, curves of every trial, and what the parameters matter."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from bsq_ray.tuning.study import TrialRecord, format_value

_GRAY, _HIGHLIGHT = "#8a8f98", "#c2372a"
# Distortions that are drawn over the rate: title, and which end is the better one.
_DISTORTIONS = {"lpips": ("LPIPS, alex (lower is better)", min), "psnr": ("PSNR, dB (higher is better)", max)}


def pareto_front(points: Sequence[tuple[float, float]], better: Any) -> list[int]:
    """Places of the points that no other one beats: fewer bits, and `better` (min or max) of the second value.

    Of equal points the first is kept.
    """
    front: list[int] = []
    for index in sorted(
        range(len(points)), key=lambda n: (points[n][0], points[n][1] * (1 if better is min else -1), n)
    ):
        value = points[index][1]
        if not front or (value != points[front[-1]][1] and better(value, points[front[-1]][1]) == value):
            front.append(index)
    return front


def plot_rate_distortion(records: Sequence[TrialRecord]) -> bytes | None:
    """PNG of bits per pixel against LPIPS and PSNR with the Pareto fronts; None without measured trials."""
    finished_records = [
        r for r in records if r.state == "finished" and {"bits_per_pixel", *_DISTORTIONS} <= r.metrics.keys()
    ]
    if not finished_records:
        return None
    figure, axes = _new_figure(2, 5.2)
    for axis, (metric, (title, better)) in zip(axes, _DISTORTIONS.items(), strict=True):
        points = [(record.metrics["bits_per_pixel"], record.metrics[metric]) for record in finished_records]
        front = pareto_front(points, better)
        axis.scatter(*zip(*points, strict=True), color=_GRAY, s=36, zorder=2)
        x, y = zip(*(points[index] for index in front), strict=True)
        axis.plot(x, y, "o-", color=_HIGHLIGHT, markersize=7, linewidth=1.6, label="Pareto front", zorder=3)
        for record, (bits, value) in zip(finished_records, points, strict=True):
            # On the side of the worse values, where the front's line is not.
            offset = (6, 4) if better is min else (7, -12)
            axis.annotate(str(record.number), (bits, value), offset, textcoords="offset points", fontsize=9)
        axis.set(xlabel="bits per pixel", title=title)
        axis.margins(0.12)
        axis.legend(frameon=False)
    return _to_png(figure)


def plot_curves(
    records: Sequence[TrialRecord], losses: dict[int, list[tuple[int, float]]], metric: str
) -> bytes | None:
    """PNG of the training loss and a held-out metric of every trial over steps; None when there is nothing to draw.

    Args:
        losses: (step, loss) of each trial, by its number.
        metric: one that is measured along the way.
    """
    import matplotlib

    reports = {r.number: [(step, f[metric]) for step, f in r.reports if metric in f] for r in records}
    plottable_records = [record for record in records if len(losses.get(record.number, [])) > 1]
    if not plottable_records:
        return None
    figure, axes = _new_figure(2, 5.2)
    colormap = matplotlib.colormaps["viridis"]
    for index, record in enumerate(plottable_records):
        color = colormap(index / max(1, len(plottable_records) - 1) * 0.92)
        label = f"{record.number}: {', '.join(format_value(value) for value in record.parameters.values())}"
        for axis, points in zip(axes, (losses[record.number], reports[record.number]), strict=True):
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=color, linewidth=1.5, label=label)
            if record.state != "finished":
                axis.plot(steps[-1], values[-1], "x", color=color, markersize=8, markeredgewidth=2)
    axes[0].set(title="Training loss", xlabel="step")
    axes[1].set(title=f"Held-out {metric}, along the way", xlabel="step")
    if len(plottable_records) <= 16:
        axes[0].legend(
            frameon=False, fontsize=8, title="trial: " + ", ".join(plottable_records[0].parameters), title_fontsize=8
        )
    if any(record.state != "finished" for record in plottable_records):
        figure.supxlabel("× ended early", fontsize=9, color=_GRAY)
    return _to_png(figure)


def plot_importance(importances: dict[str, float], metric: str) -> bytes | None:
    """PNG of how much of the metric's variance each parameter explains; None when it is not known."""
    if not importances:
        return None
    figure, [axis] = _new_figure(1, 1.2 + 0.45 * len(importances))
    names = sorted(importances, key=importances.__getitem__)
    bars = axis.barh(names, [importances[name] for name in names], color=_GRAY)
    axis.bar_label(bars, fmt="%.2f", padding=4)
    axis.set(title=f"Share of the variance of {metric} that each parameter explains (fANOVA)", xlim=(0, 1.08))
    axis.grid(visible=False)
    return _to_png(figure)


def _new_figure(columns: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13 if columns == 2 else 9, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _to_png(figure: Any) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()
