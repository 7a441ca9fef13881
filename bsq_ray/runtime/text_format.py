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
