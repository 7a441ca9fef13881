"""Being asked to stop, by Ctrl-C or by SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(external_event: threading.Event | None = None) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event; the second one is not caught. A given event is its giver's to set.

    Ray takes SIGTERM for itself when it starts, so this comes after.
    """
    stop_event = external_event or threading.Event()
    if external_event is not None or threading.current_thread() is not threading.main_thread():
        yield stop_event
        return

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop_event.set()
        for caught, handler in previous_handlers.items():
            signal.signal(caught, handler)

    previous_handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_event
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
