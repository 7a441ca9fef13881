"""Scheduling of the threads of this process: undo real-time priorities that a library sets.

SVT-AV1 gives its threads and its caller the highest real-time priority if the user is root. Threads that start later
inherit it, and on a busy machine nothing else runs any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def normal_scheduling() -> Iterator[None]:
    """Run a block that may make threads real-time; afterwards all threads have the normal policy again.

    Nothing is changed on systems without these policies, or if the caller is a real-time thread already.
    """
    was_realtime = _is_realtime(0)
    try:
        yield
    finally:
        if not was_realtime:
            _reset_threads()


def _reset_threads() -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        return
    for task in tasks.iterdir():
        # Threads may end at any time.
        try:
            if _is_realtime(int(task.name)):
                os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))
        except (ProcessLookupError, PermissionError):
            continue


def _is_realtime(thread: int) -> bool:
    """Return True if a thread is real-time; 0 is the calling thread."""
    return hasattr(os, "sched_getscheduler") and os.sched_getscheduler(thread) in (os.SCHED_FIFO, os.SCHED_RR)
