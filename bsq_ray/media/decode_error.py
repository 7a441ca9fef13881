"""Errors of decoding an image or video: whatever a decoder raises about a file becomes one `DecodeError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_MAX_TEXT = 160


class DecodeError(ValueError):
    """The file cannot be decoded; the message is the reason, or names the file and gives the reason."""


class UnknownFormatError(DecodeError):
    """The file has no format that is read."""


class TooLargeError(DecodeError):
    """The image or a frame has more pixels than the limit."""


@contextmanager
def translate_decode_errors(prefix: str = "") -> Iterator[None]:
    """Raise every error of the block as a `DecodeError`, of the same class if it is one.

    Args:
        prefix: start of the message, such as the name of the file.

    Raises:
        DecodeError: the block raised an error, such as OSError, SyntaxError, RuntimeError, MemoryError.
    """
    try:
        yield
    except DecodeError as error:
        if not prefix:
            raise
        raise type(error)(f"{prefix}{error}") from error
    except Exception as error:
        raise DecodeError(f"{prefix}{error_text(error)}") from error


def error_text(error: Exception) -> str:
    """Return the message of an error in one short line, or the name of its class."""
    return " ".join(str(error).split())[:_MAX_TEXT] or type(error).__name__
