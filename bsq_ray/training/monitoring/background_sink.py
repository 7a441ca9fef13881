"""A metrics sink in a thread of its own, for trackers whose services may respond slowly or never."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from bsq_ray.training.monitoring.metrics_sinks import MetricsSink

_MAX_PENDING_RECORDS = 10_000
_CLOSE_TIMEOUT_S = 60.0


class BackgroundSink:
    """Forwards records to a sink that is built and called in a thread; the calls here return at once.

    The first error of the sink is raised by the next call, and the thread then ends.

    Args:
        build: builds the sink.
        close_timeout_s: seconds for which `close` waits for the pending records.
        max_pending_records: records that may wait for the sink.
    """

    def __init__(
        self,
        build: Callable[[], MetricsSink],
        close_timeout_s: float = _CLOSE_TIMEOUT_S,
        max_pending_records: int = _MAX_PENDING_RECORDS,
    ) -> None:
        self._build, self._close_timeout_s = build, close_timeout_s
        # None ends the thread.
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(max_pending_records)
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Pass a record to the thread.

        Raises:
            Exception: the sink failed, or too many records wait for it.
        """
        self._enqueue(record)

    def flush(self) -> None:
        """Raise the error of the sink, if it failed; records are written as soon as the sink accepts them."""
        for error in self._errors:
            raise error

    def close(self) -> None:
        """Wait until the sink has written all records and is closed.

        Raises:
            Exception: the sink failed, or it did not finish in time.
        """
        if self._thread.is_alive():
            self._enqueue(None)
            self._thread.join(self._close_timeout_s)
        self.flush()
        if self._thread.is_alive():
            raise TimeoutError(f"{self._records.qsize()} records were not accepted within {self._close_timeout_s:g} s")

    def _enqueue(self, record: dict[str, Any] | None) -> None:
        self.flush()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            raise TimeoutError(f"{self._records.qsize()} records wait for it") from None

    def _run(self) -> None:
        try:
            sink = self._build()
            while (record := self._records.get()) is not None:
                sink.write(record)
            sink.close()
        except Exception as error:
            self._errors.append(error)
