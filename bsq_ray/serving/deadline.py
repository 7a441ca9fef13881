"""Work for a request that a thread does step by step: it ends when nobody waits for it any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

from bsq_ray.serving.errors import too_slow


@dataclass(frozen=True)
class Work:
    """A request under way.

    Attributes:
        seconds: that it may take.
        until: the end of them, by the monotonic clock.
        abandoned: set when nobody waits for the answer.
    """

    seconds: float
    until: float
    abandoned: Event

    def check(self, *_: int) -> None:
        """Raises when it is no longer worth going on.

        Raises:
            Refused: 503.
        """
        if self.abandoned.is_set() or time.monotonic() > self.until:
            raise too_slow(self.seconds)


@contextmanager
def awaited(seconds: float) -> Iterator[Work]:
    """Work that is awaited until the block is left."""
    work = Work(seconds, time.monotonic() + seconds, Event())
    try:
        yield work
    finally:
        work.abandoned.set()
