"""Read the log of a run, whose lines a power cut or a full disk may have damaged.

On a local disk the log is one file. Object stores cannot append, so it has segments there, and only the last one is
written again:

    out/metrics.jsonl  out/metrics-000001.jsonl  out/metrics-000002.jsonl …
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bsq_ray import storage

LOG_FILE = "metrics.jsonl"
_SEGMENT_PATTERN = re.compile(r"metrics-(\d{6,})\.jsonl")
_NUM_READERS = 16


@dataclass(frozen=True)
class MetricsFile:
    """Records of a run, or of a segment of its log.

    Attributes:
        records: the readable records, each with `kind` and `step`, in the order of the file.
        warning: message about damaged lines, which names the file; empty without any.
        is_intact: the file exists and every line is a record, the last one too.
    """

    records: list[dict[str, Any]]
    warning: str
    is_intact: bool


def read_metrics_file(url: str) -> MetricsFile:
    """Read the log of a run with all its segments; lines that are no records are skipped.

    A missing file has no records. A last line without an end is skipped without a warning: its writer was interrupted,
    or is writing it.

    Args:
        url: `metrics.jsonl` of the run; its other segments are in the same folder.
    """
    segments = [(url, read_segment(url)), *read_later_segments(url.rpartition("/")[0] or ".").items()]
    return MetricsFile(
        [record for _, segment in segments for record in segment.records],
        "; ".join(segment.warning for _, segment in segments if segment.warning),
        all(segment.is_intact for _, segment in segments),
    )


def segment_url(folder: str, number: int) -> str:
    """Return the URL of a segment in the folder of a run, counted from 0."""
    return storage.join(folder, f"metrics-{number:06d}.jsonl" if number else LOG_FILE)


def segment_number(url: str) -> int:
    """Return the number of the segment of this name."""
    match = _SEGMENT_PATTERN.fullmatch(url.rpartition("/")[2])
    return int(match[1]) if match else 0


def read_later_segments(folder: str) -> dict[str, MetricsFile]:
    """Read all segments but the first one, by URL in their order."""
    names = [name for name in storage.list_folder(folder) if _SEGMENT_PATTERN.fullmatch(name)]
    urls = [storage.join(folder, name) for name in sorted(names, key=segment_number)]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return dict(zip(urls, pool.map(read_segment, urls), strict=True))


def read_segment(url: str) -> MetricsFile:
    """Read one file of a log; see `read_metrics_file`."""
    if not storage.exists(url):
        return MetricsFile([], "", False)
    *lines, rest = storage.read_bytes(url).split(b"\n")
    parsed = [_parse_record(line) for line in lines]
    records = [record for record in parsed if record is not None]
    num_damaged = len(lines) - len(records)
    lines_text = "1 damaged line is" if num_damaged == 1 else f"{num_damaged} damaged lines are"
    warning = f"{url}: {lines_text} skipped" if num_damaged else ""
    return MetricsFile(records, warning, not num_damaged and not rest)


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        is_record = isinstance(record["step"], int) and isinstance(record["kind"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if is_record else None
