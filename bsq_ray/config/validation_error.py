"""Format errors of pydantic for people."""

from __future__ import annotations

from pydantic import ValidationError


def format_first_error(error: ValidationError) -> str:
    """Return the first error as "path.to.key: message", or only the message where it belongs to no key."""
    first = error.errors()[0]
    location = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{location}: {message}" if location else message
