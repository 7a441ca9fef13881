"""Why a request gets no result: a status and a sentence that may be shown to anyone."""

from __future__ import annotations


class ApiError(Exception):
    """The answer to a request that is not carried out.

    Args:
        status: of HTTP.
        message: a sentence without paths or internals.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        # All arguments, so that it survives pickling.
        super().__init__(status, message, retry_after)
        self.status, self.message, self.retry_after = status, message, retry_after

    def __str__(self) -> str:
        return self.message


def too_many_requests() -> ApiError:
    """Too many requests are under way."""
    return ApiError(429, "too many requests are under way; try again in a moment", 1)


def response_memory_exhausted() -> ApiError:
    """Other clients are still reading as much as may be held for them."""
    return ApiError(429, "too much is being read from this service; try again in a moment", 1)


def model_loading(name: str) -> ApiError:
    """Nothing can answer yet, or nothing any more."""
    return ApiError(503, f"{name} is being loaded; try again in a moment", 2)


def deadline_exceeded(timeout_s: float) -> ApiError:
    """The answer was not there in time."""
    return ApiError(
        503, f"the answer took longer than {timeout_s:g} s; a smaller image or a shorter video is faster", 10
    )
