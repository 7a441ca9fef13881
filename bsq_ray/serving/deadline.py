"""Deadline and cancellation of work that a thread does step by step for a request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

from bsq_ray.serving.errors import deadline_exceeded_error


@dataclass(frozen=True)
class Deadline:
    """Limit of the work for one request.

    Attributes:
        timeout_s: time that the request may take.
        expires_at: end of this time on the monotonic clock, in seconds.
        cancelled: set when no client waits for the response any more.
    """

    timeout_s: float
    expires_at: float
    cancelled: Event

    def check(self, *_: int) -> None:
        """Raise if the work has become useless; arguments of progress callbacks are ignored.

        Raises:
            ApiError: 503 the deadline passed or the request was canceled.
        """
        if self.cancelled.is_set() or time.monotonic() > self.expires_at:
            raise deadline_exceeded_error(self.timeout_s)


@contextmanager
def deadline_after(timeout_s: float) -> Iterator[Deadline]:
    """Yield a deadline that is canceled when the block ends."""
    deadline = Deadline(timeout_s, time.monotonic() + timeout_s, Event())
    try:
        yield deadline
    finally:
        deadline.cancelled.set()
