"""Between the workers of a Ray run and the process that started them: records one way, wishes the other.

this process ◀──take── Board (actor) ◀──records── rank 0 … rank N-1
             ──wish──▶               ──wish?────▶
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bsq_ray.training.monitoring.prometheus import Gauges
from bsq_ray.training.worker_context import Wish


@dataclass(frozen=True)
class Failure:
    """Why a group of workers ended: the first error in it, the run's step then, and whether trying again is in vain."""

    error: Exception
    step: int
    final: bool


@dataclass
class Notes:
    """What has come from the workers.

    Attributes:
        records: of the run's log.
        nodes: where each worker of the group runs, by rank.
        failure: how the group failed, if it did.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    nodes: dict[int, str] = field(default_factory=dict)
    failure: Failure | None = None


class Board:
    """Actor that all groups of workers of a run share, one after the other."""

    def __init__(self) -> None:
        self._notes = Notes()
        self._wish = Wish.GO_ON
        self._step = 0

    def new_group(self) -> None:
        """Other workers begin; only the wish to stop concerns them too."""
        self._notes = Notes(self._notes.records)
        self._step = 0
        self._wish = Wish.STOP if self._wish is Wish.STOP else Wish.GO_ON

    def join(self, rank: int, node: str) -> None:
        """A worker begins."""
        self._notes.nodes[rank] = node

    def add(self, record: dict[str, Any]) -> None:
        """A record of the run."""
        self._notes.records.append(record)
        self._step = max(self._step, record.get("step", 0))

    def fail(self, error: Exception, final: bool) -> None:
        """A worker failed. Of the failures of a group only the first counts; the others follow from it."""
        if self._notes.failure is None:
            self._notes.failure = Failure(error, self._step, final)

    def take(self) -> Notes:
        """Everything so far; the same records are not given twice."""
        notes = self._notes
        self._notes = Notes([], dict(notes.nodes), notes.failure)
        return notes

    def ask(self, wish: Wish) -> None:
        """Sets what the workers shall do; who shall stop needs no lesser wish."""
        self._wish = max(self._wish, wish)

    def wish(self) -> Wish:
        """What the workers shall do."""
        return self._wish


class RayReporter:
    """Reports to the board without waiting for it, and to Prometheus.

    Args:
        board: the actor.
        run: folder of the run.
    """

    def __init__(self, board: Any, run: str) -> None:
        import ray

        self._wait, self._get = ray.wait, ray.get
        self._board = board
        self._gauges = Gauges(run)
        self._answer: Any = None
        self._wish = Wish.GO_ON

    def record(self, record: dict[str, Any]) -> None:
        """Puts it on the board, and its numbers on this machine's endpoint."""
        self._board.add.remote(record)
        self._gauges.show(record)

    def wish(self) -> Wish:
        """The newest answer that has arrived; the next question is already under way."""
        if self._answer is None:
            self._answer = self._board.wish.remote()
        ready, _ = self._wait([self._answer], timeout=0)
        if ready:
            self._wish = self._get(ready[0])
            self._answer = None
        return self._wish
