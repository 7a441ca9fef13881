"""What a person sees while a run goes on: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

_METRIC_LABELS = {
    "loss": "loss",
    "reconstruction": "rec",
    "perceptual": "lpips",
    "generator": "gan",
    "discriminator": "disc",
    "code_usage": "codes used",
}
# Without a terminal, lines come at most this often.
_NON_TTY_INTERVAL_S = 10.0


class ProgressLine:
    """Turns a run's records into lines on stderr; a context manager, so that the terminal is left in order."""

    def __init__(self) -> None:
        # Brackets and colons in paths and messages are themselves, and no markup.
        self.console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._last_printed = 0.0

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def print_line(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, soft_wrap=True)

    def show_record(self, record: dict[str, Any]) -> None:
        """One record of the run."""
        line = _FORMATTERS.get(record["kind"], lambda _: "")(record)
        if not line:
            return
        if record["kind"] != "training":
            self.print_line(line)
        else:
            self.update_status(line, last=record["progress"] >= 1)

    def update_status(self, line: str, *, last: bool = False) -> None:
        """How far it is: replaces the line before it on a terminal, elsewhere comes now and then, and at the `last`."""
        if self._live:
            self._live.update(Text(line))
        elif time.monotonic() - self._last_printed > _NON_TTY_INTERVAL_S or last:
            self._last_printed = time.monotonic()
            self.print_line(line)


def _run_line(record: dict[str, Any]) -> str:
    return f"run: {record['out']}" + (f"  Ray dashboard: {record['dashboard']}" if record["dashboard"] else "")


def _start_line(record: dict[str, Any]) -> str:
    accumulation_text = f" x {record['accumulation']} accumulated" if record["accumulation"] > 1 else ""
    return (
        f"{record['parameters'] / 1e6:.1f} M parameters, {record['samples']} training images, "
        f"{record['workers']} worker{'s' * (record['workers'] > 1)} x {record['micro_batch_size']} images{accumulation_text} "
        f"= batch {record['batch_size']}, learning rate {record['learning_rate']:.3g}, {record['precision']} on "
        f"{record['device']}"
    )


def _training_line(record: dict[str, Any]) -> str:
    terms = "  ".join(f"{name} {record[key]:.3g}" for key, name in _METRIC_LABELS.items() if key in record)
    remaining_s = record["seconds"] * (1 / max(record["progress"], 1e-9) - 1)
    return (
        f"step {record['step']}  {terms}  {record['images_per_second']:.1f} images/s  "
        f"{100 * record['progress']:.0f} %, {format_duration(remaining_s)} left"
    )


def _evaluation_line(record: dict[str, Any]) -> str:
    metrics_text = "  ".join(
        f"{k} {v:.4g}" for k, v in record.items() if k not in ("kind", "step", "images", "weights")
    )
    weights_text = " with averaged weights" if record["weights"] == "ema" else ""
    return f"step {record['step']}  evaluated on {record['images']} images{weights_text}: {metrics_text}"


def _skipped_samples_line(record: dict[str, Any]) -> str:
    samples = record["samples"]
    return f"skipped {len(samples)} damaged sample{'s' * (len(samples) > 1)}: {'; '.join(samples[:3])}"


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.4 h, 5.1 days."""
    for unit, length, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= 2 * length or (unit == "min" and seconds >= 90):
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


_FORMATTERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "place": _run_line,
    "start": _start_line,
    "training": _training_line,
    "evaluation": _evaluation_line,
    "damaged": _skipped_samples_line,
    "restart": lambda record: f"{record['reason']}; going on from the newest checkpoint",
    "warning": lambda record: f"warning: {record['text']}",
}
