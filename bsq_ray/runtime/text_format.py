"""Format numbers for people."""

from __future__ import annotations

# Unit, its length in seconds, and the digits after the decimal point.
_DURATION_UNITS = (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0))


def format_duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two: 45 s, 12 min, 3.4 h, 5.1 days."""
    for unit, length, digits in _DURATION_UNITS:
        if seconds >= 2 * length or (unit == "min" and seconds >= 90):
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 worker, 2 workers."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
