"""Errors of the HTTP API: a status code and a message that is safe to return to clients."""

from __future__ import annotations


class ApiError(Exception):
    """Failure of a request, returned to the client as JSON with a status code.

    Args:
        status: HTTP status code.
        message: one sentence without file paths or internal details.
        retry_after: value of the header Retry-After, seconds; None omits the header.
        headers: further headers of the response.
    """

    def __init__(
        self, status: int, message: str, retry_after: int | None = None, headers: dict[str, str] | None = None
    ) -> None:
        # Pass all arguments to `args`, so that the error can be pickled between Ray actors.
        super().__init__(status, message, retry_after, headers)
        self.status, self.message, self.retry_after, self.headers = status, message, retry_after, headers or {}

    def __str__(self) -> str:
        return self.message


def too_many_requests_error() -> ApiError:
    """Return the error for a request that exceeds the limit on concurrent requests or on their memory."""
    return ApiError(429, "too many requests in progress; try again in a moment", 1)


def response_memory_error() -> ApiError:
    """Return the error for a response that exceeds the memory limit of responses in progress."""
    return ApiError(429, "too many large responses are still being sent; try again in a moment", 1)


def model_loading_error(name: str) -> ApiError:
    """Return the error for a model that has no running replica."""
    return ApiError(503, f"{name} is loading; try again in a moment", 2)


def deadline_exceeded_error(timeout_s: float) -> ApiError:
    """Return the error for a request that exceeds its timeout."""
    return ApiError(503, f"the request took longer than {timeout_s:g} s; try a smaller image or a shorter video", 10)
