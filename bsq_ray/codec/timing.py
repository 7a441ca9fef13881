"""Time spent in the parts of the codec."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def add_elapsed(timings_s: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds spent in the block to `timings_s[stage]`."""
    start_time = time.perf_counter()
    yield
    timings_s[stage] = timings_s.get(stage, 0.0) + time.perf_counter() - start_time
