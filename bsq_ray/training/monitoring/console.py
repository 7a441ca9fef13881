"""Terminal display of a run: a live status line on a terminal, occasional lines elsewhere.

record ─▶ formatter of its kind ─▶ status line (training records) or permanent line (all others)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bsq_ray.runtime.text_format import format_duration, plural
from bsq_ray.training.measurement import format_evaluation

_METRIC_LABELS = {
    "loss": "loss",
    "reconstruction": "rec",
    "perceptual": "lpips",
    "loss/generator": "gan",
    "loss/discriminator": "disc",
    "code_usage": "distinct codes",
}
# Minimum time between status lines without a terminal.
_NON_TTY_INTERVAL_S = 10.0
_MAX_LISTED_SAMPLES = 3


class ProgressLine:
    """Prints records as lines on stderr; a context manager that restores the terminal."""

    def __init__(self) -> None:
        self._is_active = True
        # Brackets and colons in paths and messages are not markup.
        self.console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._live = Live(console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._last_printed = 0.0

    def __enter__(self) -> ProgressLine:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            # The terminal may be gone.
            with suppress(OSError):
                self._live.stop()

    def print_line(self, line: str) -> None:
        """Print a permanent line."""
        self.console.print(line, soft_wrap=True)

    def show_record(self, record: dict[str, Any]) -> None:
        """Print one record of the run; kinds without a format are skipped.

        The first error, such as a closed pipe, ends the display, never the run.
        """
        if not self._is_active:
            return
        try:
            self._show(record)
        except Exception as error:
            self._is_active = False
            logging.getLogger(__name__).warning("the progress display ends: %s: %s", type(error).__name__, error)

    def _show(self, record: dict[str, Any]) -> None:
        line = _FORMATTERS.get(record["kind"], lambda _: "")(record)
        if not line:
            return
        if record["kind"] != "training":
            self.print_line(line)
        else:
            self.update_status(line, last=record["progress"] >= 1)

    def update_status(self, line: str, *, last: bool = False) -> None:
        """Replace the status line on a terminal; elsewhere print it at intervals, and always the `last` one."""
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
        f"{plural(record['workers'], 'worker')} x {record['micro_batch_size']} images{accumulation_text} = "
        f"batch {record['batch_size']}, learning rate {record['learning_rate']:.3g}, {record['precision']} on "
        f"{record['device']}; {record['optimizer']}"
    )


def _training_line(record: dict[str, Any]) -> str:
    terms = "  ".join(f"{label} {record[key]:.3g}" for key, label in _METRIC_LABELS.items() if key in record)
    remaining_s = record["seconds"] * (1 / max(record["progress"], 1e-9) - 1)
    return (
        f"step {record['step']}  {terms}  {record['images_per_second']:.1f} images/s  "
        f"{100 * record['progress']:.0f} %, {format_duration(remaining_s)} left"
    )


def _skipped_samples_line(record: dict[str, Any]) -> str:
    samples = record["samples"]
    return f"skipped {plural(len(samples), 'damaged sample')}: {'; '.join(samples[:_MAX_LISTED_SAMPLES])}"


_FORMATTERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "place": _run_line,
    "start": _start_line,
    "training": _training_line,
    "evaluation": format_evaluation,
    "skipped_samples": _skipped_samples_line,
    "restart": lambda record: f"{record['reason']}; resuming from the newest checkpoint",
    "warning": lambda record: f"warning: {record['text']}",
}
