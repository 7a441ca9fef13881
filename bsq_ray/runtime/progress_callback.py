"""Callback that long functions call with the finished and the total number of items."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Ignore the progress; the default of every `on_progress` argument."""
