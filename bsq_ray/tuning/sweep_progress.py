"""What a person sees while a sweep goes on: a line for each trial that ends, and one that says how far it all is."""

from __future__ import annotations

from bsq_ray.training.monitoring.console import ProgressLine
from bsq_ray.tuning.study import Record, Study, shown


class SweepLine:
    """Turns the events of a sweep into lines on stderr."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line

    def show(self, event: str, record: Record, study: Study) -> None:
        """One event, see `run_sweep`."""
        if event == "end":
            reason = f": {record.reason}" if record.reason else f"  {_figures(record, study)}"
            self._line.print_line(f"trial {record.number} ({_values(record)}) {record.state}{reason}")
        elif event == "retry":
            self._line.print_line(f"trial {record.number} is begun again: {record.again[-1]}")
        elif event == "interrupted":
            self._line.print_line(f"trial {record.number} has saved")
        elif record.reports:
            step, _ = record.reports[-1]
            now = f"trial {record.number} at step {step}: {_figures(record, study)}"
            self._line.update_status(f"{_summary(study)}  |  {now}")


def _summary(study: Study) -> str:
    counts = {
        state: sum(record.state == state for record in study.records) for state in ("finished", "stopped", "running")
    }
    failed = sum(record.state in ("failed", "invalid", "diverged") for record in study.records)
    best = study.best()
    name, _ = study.sweep.first_metric
    parts = [f"{counts['finished']} of {study.sweep.trials} trials finished", f"{counts['running']} running"]
    parts += [f"{counts['stopped']} stopped early"] if counts["stopped"] else []
    parts += [f"{failed} failed"] if failed else []
    parts += [f"best {name} {shown(best.figures[name])} (trial {best.number})"] if best else []
    return ", ".join(parts)


def _values(record: Record) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {shown(value)}" for name, value in record.parameters.items())


def _figures(record: Record, study: Study) -> str:
    """The sweep's metrics, or what there is of others."""
    names = [name for name in study.sweep.metrics if name in record.figures] or list(record.figures)[:2]
    return "  ".join(f"{name} {shown(record.figures[name])}" for name in names)
