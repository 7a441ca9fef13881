"""Between the workers of a Ray run and the process that started them: records one way, wishes the other.

this process ◀──take── Board (actor) ◀──records── rank 0 … rank N-1
             ──stop──▶               ──stop?────▶
"""

from __future__ import annotations

from typing import Any


class Board:
    """Actor between the workers and the process that started them."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stop = False
        self._starts = 0
        self._step = 0
        self._failed_start = -1
        self._failure: tuple[Exception, int] | None = None
        self._hopeless = False

    def start(self) -> None:
        """The first worker of a group begins."""
        self._starts += 1

    def add(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._step = max(self._step, record.get("step", 0))

    def fail(self, error: Exception, final: bool) -> None:
        """A worker failed. What fails twice at the same step in the same way will fail again.

        Of the failures of one group only the first counts; the others follow from it.
        """
        if self._failed_start == self._starts:
            return
        self._failed_start = self._starts
        failure = (error, self._step)
        again = self._failure is not None and (str(self._failure[0]), self._failure[1]) == (str(error), self._step)
        self._hopeless = final or again
        self._failure = failure

    def hopeless(self) -> bool:
        return self._hopeless

    def failure(self) -> Exception | None:
        return self._failure[0] if self._failure else None

    def take(self) -> tuple[list[dict[str, Any]], int]:
        """Records since the last call, and how often workers were started."""
        records, self._records = self._records, []
        return records, self._starts

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


class RayReporter:
    """Reports to the board without waiting for it."""

    def __init__(self, board: Any) -> None:
        import ray

        self._wait, self._get = ray.wait, ray.get
        self._board = board
        self._answer: Any = None
        self._stop = False

    def record(self, record: dict[str, Any]) -> None:
        self._board.add.remote(record)

    def stop_requested(self) -> bool:
        """The newest answer that has arrived; the next question is already under way."""
        if self._answer is None:
            self._answer = self._board.stop_requested.remote()
        ready, _ = self._wait([self._answer], timeout=0)
        if ready:
            self._stop = bool(self._get(ready[0]))
            self._answer = None
        return self._stop
