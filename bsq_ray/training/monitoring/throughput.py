"""Where the time of a run goes: waiting for data, evaluations, and the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Runs from the first step of this part of a run.

    Args:
        before: seconds of the parts before.
        now: gives the time in seconds.
    """

    def __init__(self, before: float, now: Callable[[], float] = time.monotonic) -> None:
        self._before, self._now = before, now
        self._began = now()
        self._waited = self._aside = self._lap = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of all parts, evaluations included."""
        return self._before + self._now() - self._began

    @property
    def stepping(self) -> float:
        """Seconds of this part without evaluations; above 0."""
        return max(self._now() - self._began - self._aside, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of `stepping` that was spent waiting for data, 0 to 1."""
        return self._waited / self.stepping

    def lap(self) -> float:
        """Seconds since the last lap, without evaluations; above 0."""
        before, self._lap = self._lap, self.stepping
        return max(self._lap - before, 1e-9)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        began = self._now()
        yield
        self._waited += self._now() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no step: evaluations and pictures."""
        began = self._now()
        yield
        self._aside += self._now() - began
