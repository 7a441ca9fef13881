"""Results of a sweep: a table, the best configuration as a preset, plots, and a README that shows them."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import storage
from bsq_ray.runtime.text_format import format_duration
from bsq_ray.training.monitoring.metrics_file import read_metrics_file
from bsq_ray.tuning import sweep_plots
from bsq_ray.tuning.study import Study, TrialRecord, TrialRecordState, format_value
from bsq_ray.tuning.sweep_config import INTERMEDIATE_METRICS

# Columns of the Markdown table after the sweep's own metrics; the Parquet table has all metrics.
_TABLE_METRICS = ("bits_per_pixel", "psnr", "lpips", "ssim", "bits_per_token", "steps", "train_seconds")
_PLOT_TITLES = {
    "rate-distortion.png": "Rate-distortion on held-out images, finished trials",
    "curves.png": "Training loss and held-out metric of every trial",
    "importance.png": "Importance of the parameters",
}


def write_results(study: Study) -> None:
    """Write results.parquet, README.md, best.yaml and the plots into the sweep's folder, from the records so far."""
    out_url, best = study.out_url, study.best_trial()
    storage.write_bytes(storage.join(out_url, "results.parquet"), _to_parquet(study))
    if best is not None:
        storage.write_text(storage.join(out_url, "best.yaml"), _best_preset(study, best))
    metric, _ = study.sweep.first_metric
    intermediate_metrics = INTERMEDIATE_METRICS[study.sweep.stage]
    curve_metric = metric if metric in intermediate_metrics else intermediate_metrics[0]
    losses = {record.number: _read_losses(study.trial_url(record)) for record in study.records}
    rendered_plots = {
        "rate-distortion.png": sweep_plots.plot_rate_distortion(study.records),
        "curves.png": sweep_plots.plot_curves(study.records, losses, curve_metric),
        "importance.png": sweep_plots.plot_importance(study.importances(), metric),
    }
    plot_files = {name: png for name, png in rendered_plots.items() if png is not None}
    for name, png in plot_files.items():
        storage.write_bytes(storage.join(out_url, name), png)
    text = _readme(study, best, list(plot_files))
    storage.write_text(storage.join(out_url, "README.md"), text)


def markdown_table(study: Study) -> str:
    """Return the trials as a Markdown table, the best one in bold."""
    best = study.best_trial()
    metric_names = {name for record in study.records for name in record.metrics}
    metric_columns = [name for name in dict.fromkeys([*study.sweep.metrics, *_TABLE_METRICS]) if name in metric_names]
    parameter_names = list(study.sweep.space)
    header = ["trial", "state", *parameter_names, *metric_columns]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for record in study.records:
        cells = [format_value(record.parameters[name]) for name in parameter_names]
        cells += [format_value(record.metrics[name]) if name in record.metrics else "–" for name in metric_columns]
        row = [str(record.number), record.state, *cells]
        lines.append("| " + " | ".join(f"**{cell}**" if record is best else cell for cell in row) + " |")
    return "\n".join(lines)


def _readme(study: Study, best: TrialRecord | None, plot_names: list[str]) -> str:
    sweep = study.sweep
    name, mode = sweep.first_metric
    lines = [f"# Sweep {sweep.name}", "", *([sweep.description, ""] if sweep.description else [])]
    counts = Counter(record.state for record in study.records)
    state_counts = ", ".join(f"{counts[state]} {label}" for state, label in _STATE_LABELS.items() if counts[state])
    lines += [f"{len(study.records)} of {sweep.num_trials} trials of the preset `{sweep.preset}`: {state_counts}.", ""]
    if best is not None:
        lines += [
            f"Best {name} ({mode}): trial {best.number}, {format_value(best.metrics[name])}. Its configuration is "
            f"`best.yaml`, its model `trials/{best.number:03}/model`.",
            "",
        ]
    lines += [markdown_table(study), ""]
    for plot_name in plot_names:
        lines += [f"![{_PLOT_TITLES[plot_name]}]({plot_name})", ""]
    lines += _failures(study.records)
    return "\n".join(lines)


_STATE_LABELS: dict[TrialRecordState, str] = {
    "finished": "finished",
    "stopped": "stopped early by the scheduler",
    "running": "interrupted",
    "failed": "failed",
    "diverged": "diverged",
    "invalid": "invalid",
}


def _failures(records: list[TrialRecord]) -> list[str]:
    """Return the lines that list failed and retried trials with their reasons."""
    lines = [f"- trial {r.number} {r.state}: {r.reason}" for r in records if r.reason]
    lines += [f"- trial {r.number} retried: {reason}" for r in records for reason in r.retry_reasons]
    return ["## Failures", "", *lines, ""] if lines else []


def _to_parquet(study: Study) -> bytes:
    """Return a table with a row per trial: number, state, parameters as param.NAME, metrics, num_attempts, reason."""
    metric_names = sorted({name for record in study.records for name in record.metrics})
    best = study.best_trial()
    columns: dict[str, list[Any]] = {
        "trial": [record.number for record in study.records],
        "state": [record.state for record in study.records],
        "best": [record is best for record in study.records],
    }
    for name in study.sweep.space:
        values = [record.parameters[name] for record in study.records]
        has_mixed_types = len({type(value) for value in values}) > 1
        columns[f"param.{name}"] = [str(value) for value in values] if has_mixed_types else values
    columns |= {name: [record.metrics.get(name) for record in study.records] for name in metric_names}
    columns["num_attempts"] = [record.num_attempts for record in study.records]
    columns["reason"] = [record.reason for record in study.records]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _best_preset(study: Study, best: TrialRecord) -> str:
    name, mode = study.sweep.first_metric
    budget = study.sweep.budget
    budget_text = format_duration(60 * budget.minutes) if budget.minutes else f"{budget.steps or 'all'} steps"
    comments = [
        f"Trial {best.number} of sweep {study.sweep.name}, best {name} ({mode}): {format_value(best.metrics[name])}.",
        f"The trials trained for {budget_text}; this preset trains as long as its base unless it sets training.steps.",
    ]
    return study.to_preset(best, f"{study.sweep.name}-best", comments, include_steps=False)


def _read_losses(run_url: str) -> list[tuple[int, float]]:
    """Return (step, loss) of each training record of a run."""
    records = read_metrics_file(storage.join(run_url, "metrics.jsonl")).records
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "training" and "loss" in record]
