"""The log of a run on an object store, which cannot append: segments, uploaded by a thread.

    record ─▶ open segment ─▶ (flush) thread: write the open segment again ─▶ full: open the next one

The bytes that are uploaded grow with the length of the log, not with its square.
"""

from __future__ import annotations

import json
from typing import Any

from bsq_ray import storage
from bsq_ray.runtime.daemon_thread import BackgroundUpload
from bsq_ray.training.monitoring.metrics_file import (
    MetricsFile,
    read_later_segments,
    read_segment,
    segment_number,
    segment_url,
)

# Size at which a segment is closed: a flush writes half of it again on average, and 100 MB of log are 400 objects.
SEGMENT_BYTES = 2**18


class SegmentedLogSink:
    """Writes records to segments of `metrics.jsonl`; drops records after `last_step`.

    Args:
        out_url: folder of the run on an object store.
        last_step: last completed step of a resumed run; 0 for a new run.
        segment_bytes: size at which a segment is closed.

    Attributes:
        warning: message about damaged lines of the existing log, which are dropped; empty without any.
    """

    def __init__(self, out_url: str, last_step: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._out_url, self._segment_bytes = out_url, segment_bytes
        first_url = segment_url(out_url, 0)
        segments = {first_url: read_segment(first_url), **read_later_segments(out_url)}
        self.warning = "; ".join(segment.warning for segment in segments.values() if segment.warning)
        self._number, self._num_uploaded, self._lines = 0, 0, list[str]()
        for url, segment in segments.items():
            lines = [f"{json.dumps(record)}\n" for record in segment.records if record["step"] <= last_step]
            self._keep(url, segment, lines)
        self._open_next_if_full()
        self._background = BackgroundUpload(self._upload, "metrics")

    def write(self, record: dict[str, Any]) -> None:
        """Log a record; it is uploaded by the next `flush`."""
        self._lines.append(f"{json.dumps(record)}\n")

    def flush(self) -> None:
        """Start to upload all records, without waiting for storage.

        Raises:
            StorageUnavailableError: the previous upload failed; its records are part of this one.
        """
        self._background.start()

    def close(self) -> None:
        """Upload all records.

        Raises:
            StorageUnavailableError: storage is unavailable; the records are kept for the next call.
        """
        self._background.finish()

    def _keep(self, url: str, segment: MetricsFile, lines: list[str]) -> None:
        """Keep the lines of an existing segment; the last one that is left is the open one."""
        number = segment_number(url)
        if number and not lines:
            storage.remove(url)
            return
        if not segment.is_intact or len(lines) < len(segment.records):
            storage.write_text(url, "".join(lines))
        self._number, self._lines, self._num_uploaded = number, lines, len(lines)

    def _upload(self) -> None:
        """Write the open segment, unless it has no new records, and open the next one if it is full."""
        # A snapshot, because the training thread appends to the list.
        lines = self._lines[:]
        if len(lines) == self._num_uploaded:
            return
        storage.write_text(segment_url(self._out_url, self._number), "".join(lines))
        self._num_uploaded = len(lines)
        self._open_next_if_full()

    def _open_next_if_full(self) -> None:
        if sum(map(len, self._lines[: self._num_uploaded])) >= self._segment_bytes:
            del self._lines[: self._num_uploaded]
            self._number, self._num_uploaded = self._number + 1, 0
