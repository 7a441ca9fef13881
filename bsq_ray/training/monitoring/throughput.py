"""Where the time of a run goes: waiting for data, evaluations, and the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Runs from the first step of this part of a run.

    Args:
        before: seconds of the parts before.
        now: gives the time in seconds.
    """

    def __init__(self, elapsed_before: float, now: Callable[[], float] = time.monotonic) -> None:
        self._elapsed_before, self._now = elapsed_before, now
        self._start_time = now()
        self._data_wait_s = self._excluded_s = self._last_lap_s = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of all parts, evaluations included."""
        return self._elapsed_before + self._now() - self._start_time

    @property
    def step_seconds(self) -> float:
        """Seconds of this part without evaluations; above 0."""
        return max(self._now() - self._start_time - self._excluded_s, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of `stepping` that was spent waiting for data, 0 to 1."""
        return self._data_wait_s / self.step_seconds

    def lap(self) -> float:
        """Seconds since the last lap, without evaluations; above 0."""
        previous, self._last_lap_s = self._last_lap_s, self.step_seconds
        return max(self._last_lap_s - previous, 1e-9)

    @contextmanager
    def data_wait_timer(self) -> Iterator[None]:
        """Around waiting for data."""
        start = self._now()
        yield
        self._data_wait_s += self._now() - start

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Around what is no step: evaluations and pictures."""
        start = self._now()
        yield
        self._excluded_s += self._now() - start
