"""Errors of Ray, translated to the errors of the code that failed in a worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from bsq_ray.runtime._ray_internals import recent_worker_errors

_ANSI_PATTERN = re.compile(r"\x1b\[[0-9;]*m")
_ERROR_LINE_PATTERN = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*")


@contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Raise what a task or actor raised in place of Ray's error, which contains the whole traceback as text.

    Raises:
        Exception: the error that a function raised in a worker.
        RuntimeError: any other error of Ray, such as a worker that died; the message is one line.
    """
    try:
        yield
    except Exception as error:
        from ray.exceptions import RayError

        if not isinstance(error, RayError):
            raise
        raise find_cause(error) from error


def find_cause(error: Exception) -> Exception:
    """Return the error that code raised in a worker, or a RuntimeError with one line about an error of Ray itself."""
    from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError

    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception) and error.cause is not error:
        error = error.cause
    if not isinstance(error, RayError):
        return error
    if isinstance(error, (WorkerCrashedError, RayActorError)):
        reason = next(iter(recent_worker_errors()), "") or _error_line(str(error))
        return RuntimeError(f"a worker process of Ray died: {reason}")
    return RuntimeError(_error_line(str(error)))


def _error_line(text: str) -> str:
    """Return the last line that names an error, without color codes; the first line if there is none."""
    lines = [line.strip() for line in _ANSI_PATTERN.sub("", text).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if _ERROR_LINE_PATTERN.match(line)), lines[0] if lines else "no reason"
    )
