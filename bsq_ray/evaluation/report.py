"""Write the report of a run: one self-contained HTML file with examples, metrics, curves and the configuration."""

from __future__ import annotations

import base64
import io
import json
import logging
from typing import Any

import jinja2

from bsq_ray import config, storage
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import COLUMNS
from bsq_ray.runtime.text_format import format_duration
from bsq_ray.training.monitoring.metrics_file import read_metrics_file

# Curves of the report: title, unit, kind of the records, and names of the plotted values.
_CURVES = (
    ("Reconstruction and perceptual loss", "loss", "training", ("reconstruction", "perceptual")),
    ("Generator and discriminator", "loss", "training", ("loss/generator", "loss/discriminator")),
    ("Held-out PSNR", "dB", "evaluation", ("held_out/psnr",)),
    ("PSNR of training images", "dB", "evaluation", ("train/psnr",)),
    ("Entropy of the codes", "bits", "training", ("codebook_entropy", "per_sample_entropy")),
)
_SUMMARY_KEYS = ("step", "duration_s", "images_per_second", "workers", "data_wait_fraction", "restarts", "measured_on")
_logger = logging.getLogger(__name__)


def write_report(run_url: str, evaluation_url: str, out_url: str) -> None:
    """Write the report of a finished run and its evaluation.

    What a crash has damaged in the log or the summary of the run is left out of the report, with a warning.

    Args:
        run_url: folder of the run (config.yaml, metrics.jsonl, summary.json).
        evaluation_url: output folder of `evaluate_reconstruction`.
        out_url: the HTML file.

    Raises:
        ValueError: the evaluation or the configuration is missing or damaged.
    """
    results = _read_results(storage.join(evaluation_url, "results.json"))
    metrics_file = read_metrics_file(storage.join(run_url, "metrics.jsonl"))
    if metrics_file.warning:
        _logger.warning(metrics_file.warning)
    text = storage.read_text(storage.join(run_url, "config.yaml"))
    summary = _read_summary(storage.join(run_url, "summary.json"))
    is_video = results["provenance"]["kind"] == "videos"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bsq_ray.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("report.html").render(
        run=config.parse_config(text, storage.join(run_url, "config.yaml")),
        config_text=text,
        provenance=results["provenance"],
        model_id=results["model_id"],
        header=[spec[0] for spec in _visible_columns(results).values()],
        rows=_table_rows(results),
        is_video=is_video,
        plot=_data_url(evaluation_url, "png"),
        animation=_data_url(evaluation_url, "webp") if is_video else None,
        frame_curves=_frame_curves(results),
        curves=[curve for spec in _CURVES if (curve := _training_curve(metrics_file.records, *spec))],
        metrics=results["rows"]["model"],
        summary=summary,
        duration=format_duration(summary["duration_s"]) if summary else "",
        run_url=run_url,
        provenance_text=json.dumps(results["provenance"], indent=2),
    )
    storage.write_text(out_url, html)


def _read_results(url: str) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(storage.read_bytes(url))
        return {**results, "rows": results["rows"], "provenance": results["provenance"]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{url} is damaged ({error}); evaluate the model again") from error


def _read_summary(url: str) -> dict[str, Any] | None:
    """Return the summary of a run; None with a warning if it is missing or damaged."""
    try:
        summary = json.loads(storage.read_bytes(url))
        return {name: summary[name] for name in _SUMMARY_KEYS}
    except storage.StorageUnavailableError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        _logger.warning("the report has no times: %s is missing or damaged (%s)", url, error)
        return None


def _data_url(evaluation_url: str, suffix: str) -> str:
    """Return a plot of the evaluation as a data URL."""
    content = storage.read_bytes(storage.join(evaluation_url, f"reconstructions.{suffix}"))
    return f"data:image/{suffix};base64,{base64.b64encode(content).decode()}"


def _visible_columns(results: dict[str, Any]) -> dict[str, Any]:
    return {key: spec for key, spec in COLUMNS.items() if any(key in row for row in results["rows"].values())}


def _table_rows(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return rows of (name, [(text, True for the better value)])."""
    rows = []
    for name, metrics in results["rows"].items():
        cells = []
        for key, (_, digits, better) in _visible_columns(results).items():
            values = [row[key] for row in results["rows"].values() if key in row]
            best = better is not None and key in metrics and len(values) > 1 and metrics[key] == better(values)
            cells.append((f"{metrics[key]:.{digits}f}" if key in metrics else "–", best))
        rows.append((name, cells))
    return rows


def _training_curve(
    records: list[dict[str, Any]], title: str, unit: str, kind: str, names: tuple[str, ...]
) -> dict[str, str] | None:
    """Plot values from the records of a run; return None if there are fewer than two points."""
    series = {name: [(r["step"], r[name]) for r in records if r["kind"] == kind and name in r] for name in names}
    series = {name: points for name, points in series.items() if len(points) > 1}
    return _plot(series, title, "step", unit) if series else None


def _frame_curves(results: dict[str, Any]) -> list[dict[str, str]]:
    """Plot the metrics of clips over the position of the frame."""
    rows = results.get("per_frame", {})
    curves = []
    for name, label, unit in (("psnr", "PSNR", "dB"), ("lpips", "LPIPS", "")):
        series = {
            "this tokenizer" if row == "model" else row: list(enumerate(metrics[name], 1))
            for row, metrics in rows.items()
        }
        curves += [_plot(series, f"{label} by position in the clip", "frame", unit)] if series else []
    return curves


def _plot(series: dict[str, list[tuple[int, float]]], title: str, x_label: str, unit: str) -> dict[str, str]:
    """Plot lines of (x, y); return title, inline SVG and a description."""
    from matplotlib.figure import Figure

    # This gray is legible on white and on black.
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), color in zip(series.items(), ("#2a78c2", "#d0742c"), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=_label(name), color=color, linewidth=1.6)
    axes.set_xlabel(x_label, color="#808080")
    axes.set_ylabel(unit, color="#808080")
    axes.tick_params(colors="#808080")
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(frameon=False, labelcolor="#808080")
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    last = ", ".join(f"{_label(name)} ends at {points[-1][1]:.3g}" for name, points in series.items())
    text = svg.getvalue()
    return {"title": title, "svg": text[text.index("<svg") :], "description": f"{title} over {x_label}s: {last}."}


def _label(metric_name: str) -> str:
    """Return the legend of a metric: its name without the group, such as "loss/"."""
    return metric_name.rpartition("/")[2].replace("_", " ")
