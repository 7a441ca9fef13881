"""Being asked to stop, by Ctrl-C or by SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(given: threading.Event | None = None) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event; the second one is not caught. A given event is its giver's to set.

    Ray takes SIGTERM for itself when it starts, so this comes after.
    """
    stop = given or threading.Event()
    if given is not None or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        for caught, handler in before.items():
            signal.signal(caught, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
