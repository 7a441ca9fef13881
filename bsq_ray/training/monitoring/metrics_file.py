"""Read `metrics.jsonl`, whose lines a power cut or a full disk may have damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bsq_ray import storage


@dataclass(frozen=True)
class MetricsFile:
    """Records of a run.

    Attributes:
        records: the readable records, each with `kind` and `step`, in the order of the file.
        warning: message about damaged lines, which names the file; empty without any.
    """

    records: list[dict[str, Any]]
    warning: str


def read_metrics_file(url: str) -> MetricsFile:
    """Read the log of a run; lines that are no records are skipped, and a missing file has none.

    A last line without an end is skipped without a warning: its writer was interrupted, or is writing it.
    """
    lines = storage.read_bytes(url).split(b"\n")[:-1] if storage.exists(url) else []
    parsed = [_parse_record(line) for line in lines]
    records = [record for record in parsed if record is not None]
    num_damaged = len(lines) - len(records)
    lines_text = "1 damaged line is" if num_damaged == 1 else f"{num_damaged} damaged lines are"
    return MetricsFile(records, f"{url}: {lines_text} skipped" if num_damaged else "")


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        is_record = isinstance(record["step"], int) and isinstance(record["kind"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if is_record else None
