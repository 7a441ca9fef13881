"""Errors of the HTTP API: a status and a message that may be shown to anyone."""

from __future__ import annotations


class ApiError(Exception):
    """Failure of a request, reported to its client.

    Args:
        status: HTTP status code.
        message: a sentence without paths or internals.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        # All arguments reach `args`, so the error survives pickling.
        super().__init__(status, message, retry_after)
        self.status, self.message, self.retry_after = status, message, retry_after

    def __str__(self) -> str:
        return self.message


def too_many_requests() -> ApiError:
    """Return the error for a request beyond the limit of concurrent requests or of their memory."""
    return ApiError(429, "too many requests in progress; try again in a moment", 1)


def response_memory_exhausted() -> ApiError:
    """Return the error for a response beyond the memory limit for responses that clients are still reading."""
    return ApiError(429, "clients are reading too many large responses; try again in a moment", 1)


def model_loading(name: str) -> ApiError:
    """Return the error for a model that has no running replica."""
    return ApiError(503, f"{name} is loading; try again in a moment", 2)


def deadline_exceeded(timeout_s: float) -> ApiError:
    """Return the error for a request that exceeds its timeout."""
    return ApiError(503, f"the request took longer than {timeout_s:g} s; try a smaller image or a shorter video", 10)
