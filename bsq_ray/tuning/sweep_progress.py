"""Terminal display of a sweep: a line for each trial that ends, and a status line."""

from __future__ import annotations

from bsq_ray.training.monitoring.console import ProgressLine
from bsq_ray.tuning.study import Study, TrialRecord, format_value


class SweepProgress:
    """Prints the events of a sweep on stderr."""

    def __init__(self, progress_line: ProgressLine) -> None:
        self._progress_line = progress_line

    def on_event(self, event: str, record: TrialRecord, study: Study) -> None:
        """Print one event, see `run_sweep`."""
        if event == "end":
            details = f": {record.reason}" if record.reason else f"  {_format_metrics(record, study)}"
            self._progress_line.print_line(
                f"trial {record.number} ({_format_parameters(record)}) {record.state}{details}"
            )
        elif event == "retry":
            self._progress_line.print_line(f"trial {record.number} is retried: {record.retry_reasons[-1]}")
        elif event == "interrupted":
            self._progress_line.print_line(f"trial {record.number} is saved")
        elif record.reports:
            step, _ = record.reports[-1]
            current = f"trial {record.number} at step {step}: {_format_metrics(record, study)}"
            self._progress_line.update_status(f"{_format_summary(study)}  |  {current}")


def _format_summary(study: Study) -> str:
    counts = {state: sum(r.state == state for r in study.records) for state in ("finished", "stopped", "running")}
    num_failed = sum(record.state in ("failed", "invalid", "diverged") for record in study.records)
    best = study.best_trial()
    name, _ = study.sweep.first_metric
    parts = [f"{counts['finished']} of {study.sweep.num_trials} trials finished", f"{counts['running']} running"]
    if counts["stopped"]:
        parts.append(f"{counts['stopped']} stopped early")
    if num_failed:
        parts.append(f"{num_failed} failed")
    if best is not None:
        parts.append(f"best {name} {format_value(best.metrics[name])} (trial {best.number})")
    return ", ".join(parts)


def _format_parameters(record: TrialRecord) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {format_value(value)}" for name, value in record.parameters.items())


def _format_metrics(record: TrialRecord, study: Study) -> str:
    """Return the sweep's metrics of a trial, or its first two metrics if it has none of them."""
    names = [name for name in study.sweep.metrics if name in record.metrics] or list(record.metrics)[:2]
    return "  ".join(f"{name} {format_value(record.metrics[name])}" for name in names)
