"""What a person sees while a sweep goes on: a line for each trial that ends, and one that says how far it all is."""

from __future__ import annotations

from bsq_ray.training.monitoring.console import ProgressLine
from bsq_ray.tuning.study import Study, TrialRecord, format_value


class SweepProgress:
    """Turns the events of a sweep into lines on stderr."""

    def __init__(self, progress_line: ProgressLine) -> None:
        self._progress_line = progress_line

    def on_event(self, event: str, record: TrialRecord, study: Study) -> None:
        """One event, see `run_sweep`."""
        if event == "end":
            reason = f": {record.reason}" if record.reason else f"  {_format_metrics(record, study)}"
            self._progress_line.print_line(
                f"trial {record.number} ({_format_parameters(record)}) {record.state}{reason}"
            )
        elif event == "retry":
            self._progress_line.print_line(f"trial {record.number} is begun again: {record.retry_reasons[-1]}")
        elif event == "interrupted":
            self._progress_line.print_line(f"trial {record.number} has saved")
        elif record.reports:
            step, _ = record.reports[-1]
            current = f"trial {record.number} at step {step}: {_format_metrics(record, study)}"
            self._progress_line.update_status(f"{_format_summary(study)}  |  {current}")


def _format_summary(study: Study) -> str:
    state_counts = {
        state: sum(record.state == state for record in study.records) for state in ("finished", "stopped", "running")
    }
    num_failed = sum(record.state in ("failed", "invalid", "diverged") for record in study.records)
    best_record = study.best_trial()
    name, _ = study.sweep.first_metric
    parts = [
        f"{state_counts['finished']} of {study.sweep.num_trials} trials finished",
        f"{state_counts['running']} running",
    ]
    parts += [f"{state_counts['stopped']} stopped early"] if state_counts["stopped"] else []
    parts += [f"{num_failed} failed"] if num_failed else []
    parts += (
        [f"best {name} {format_value(best_record.metrics[name])} (trial {best_record.number})"] if best_record else []
    )
    return ", ".join(parts)


def _format_parameters(record: TrialRecord) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {format_value(value)}" for name, value in record.parameters.items())


def _format_metrics(record: TrialRecord, study: Study) -> str:
    """The sweep's metrics, or what there is of others."""
    names = [name for name in study.sweep.metrics if name in record.metrics] or list(record.metrics)[:2]
    return "  ".join(f"{name} {format_value(record.metrics[name])}" for name in names)
