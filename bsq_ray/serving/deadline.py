"""Work for a request that a thread does step by step: it ends when nobody waits for it any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

from bsq_ray.serving.errors import deadline_exceeded


@dataclass(frozen=True)
class Deadline:
    """A request under way.

    Attributes:
        seconds: that it may take.
        until: the end of them, by the monotonic clock.
        abandoned: set when nobody waits for the answer.
    """

    timeout_s: float
    expires_at: float
    cancelled: Event

    def check(self, *_: int) -> None:
        """Raises when it is no longer worth going on.

        Raises:
            Refused: 503.
        """
        if self.cancelled.is_set() or time.monotonic() > self.expires_at:
            raise deadline_exceeded(self.timeout_s)


@contextmanager
def deadline_after(timeout_s: float) -> Iterator[Deadline]:
    """Work that is awaited until the block is left."""
    deadline = Deadline(timeout_s, time.monotonic() + timeout_s, Event())
    try:
        yield deadline
    finally:
        deadline.cancelled.set()
