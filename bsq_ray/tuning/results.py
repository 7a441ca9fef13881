"""What a sweep leaves: a table, the best configuration as a preset, plots, and a page that shows them."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import storage
from bsq_ray.training.monitoring.console import format_duration
from bsq_ray.tuning import sweep_plots
from bsq_ray.tuning.study import Record, State, Study, shown
from bsq_ray.tuning.sweep_config import ALONG

# Figures shown in the Markdown table after the sweep's own metrics; the Parquet table has all.
_SHOWN = ("bits_per_pixel", "psnr", "lpips", "ssim", "bits_per_token", "steps", "train_seconds")
_PICTURES = {
    "rate-distortion.png": "Rate against distortion on held-out images, trials that finished",
    "curves.png": "Every trial over its steps",
    "importance.png": "What the parameters matter",
}


def write_results(study: Study) -> None:
    """Writes results.parquet, README.md, best.yaml and the plots into the sweep's folder, from what is known so far."""
    out_url, best = study.out_url, study.best()
    storage.write_bytes(storage.join(out_url, "results.parquet"), _parquet(study))
    if best is not None:
        storage.write_bytes(storage.join(out_url, "best.yaml"), _best_preset(study, best).encode())
    metric, _ = study.sweep.first_metric
    along = metric if metric in ALONG[study.sweep.stage] else ALONG[study.sweep.stage][0]
    losses = {record.number: _losses(study.trial_url(record)) for record in study.records}
    drawn = {
        "rate-distortion.png": sweep_plots.rate_distortion(study.records),
        "curves.png": sweep_plots.curves(study.records, losses, along),
        "importance.png": sweep_plots.importance(study.importances(), metric),
    }
    pictures = {name: png for name, png in drawn.items() if png is not None}
    for name, png in pictures.items():
        storage.write_bytes(storage.join(out_url, name), png)
    text = _page(study, best, list(pictures))
    storage.write_bytes(storage.join(out_url, "README.md"), text.encode())


def markdown(study: Study) -> str:
    """The trials as a Markdown table, the best one in bold."""
    best = study.best()
    given = {name for record in study.records for name in record.figures}
    figures = [name for name in dict.fromkeys([*study.sweep.metrics, *_SHOWN]) if name in given]
    names = list(study.sweep.space)
    header = ["trial", "state", *names, *figures]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for record in study.records:
        cells = [shown(record.parameters[name]) for name in names]
        cells += [shown(record.figures[name]) if name in record.figures else "–" for name in figures]
        row = [str(record.number), record.state, *cells]
        lines.append("| " + " | ".join(f"**{cell}**" if record is best else cell for cell in row) + " |")
    return "\n".join(lines)


def _page(study: Study, best: Record | None, pictures: list[str]) -> str:
    sweep = study.sweep
    name, direction = sweep.first_metric
    lines = [f"# Sweep {sweep.name}", "", *([sweep.description, ""] if sweep.description else [])]
    counts = Counter(record.state for record in study.records)
    told = ", ".join(f"{counts[state]} {words}" for state, words in _STATES.items() if counts[state])
    lines += [f"{len(study.records)} of {sweep.trials} trials of the preset `{sweep.preset}`: {told}.", ""]
    if best is not None:
        lines += [
            f"The best by {name} ({direction}) is trial {best.number}, {shown(best.figures[name])}: `best.yaml` is its "
            f"configuration, `trials/{best.number:03}/model` its model.",
            "",
        ]
    lines += [markdown(study), ""]
    for picture in pictures:
        lines += [f"![{_PICTURES[picture]}]({picture})", ""]
    lines += _troubles(study.records)
    return "\n".join(lines)


_STATES: dict[State, str] = {
    "finished": "finished",
    "stopped": "stopped early by the scheduler",
    "running": "interrupted",
    "failed": "failed",
    "diverged": "diverged",
    "invalid": "not possible",
}


def _troubles(records: list[Record]) -> list[str]:
    """What failed and why, and what was begun again."""
    lines = [f"- trial {r.number} is {r.state}: {r.reason}" for r in records if r.reason]
    lines += [f"- trial {r.number} was begun again: {reason}" for r in records for reason in r.again]
    return ["## What went wrong", "", *lines, ""] if lines else []


def _parquet(study: Study) -> bytes:
    """One row for each trial: number, state, its parameters as param.NAME, figures, attempts, reason."""
    names = sorted({name for record in study.records for name in record.figures})
    best = study.best()
    columns: dict[str, list[Any]] = {
        "trial": [record.number for record in study.records],
        "state": [record.state for record in study.records],
        "best": [record is best for record in study.records],
    }
    for name in study.sweep.space:
        values = [record.parameters[name] for record in study.records]
        mixed = len({type(value) for value in values}) > 1
        columns[f"param.{name}"] = [str(value) for value in values] if mixed else values
    columns |= {name: [record.figures.get(name) for record in study.records] for name in names}
    columns["attempts"] = [record.attempts for record in study.records]
    columns["reason"] = [record.reason for record in study.records]
    table = io.BytesIO()
    pq.write_table(pa.table(columns), table)
    return table.getvalue()


def _best_preset(study: Study, best: Record) -> str:
    name, direction = study.sweep.first_metric
    budget = study.sweep.budget
    length = format_duration(60 * budget.minutes) if budget.minutes else f"{budget.steps or 'all'} steps"
    comments = [
        f"Trial {best.number} of sweep {study.sweep.name}, best by {name} ({direction}): {shown(best.figures[name])}.",
        f"The trials trained for {length}; this preset trains as long as its base, unless training.steps is given.",
    ]
    return study.preset(best, f"{study.sweep.name}-best", comments, steps=False)


def _losses(run_url: str) -> list[tuple[int, float]]:
    """(step, loss) of a run so far."""
    url = storage.join(run_url, "metrics.jsonl")
    lines = storage.read_bytes(url).splitlines(keepends=True) if storage.exists(url) else []
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "training" and "loss" in record]
