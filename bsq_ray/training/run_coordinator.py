"""Between the workers of a Ray run and the process that started them: records one way, wishes the other.

this process ◀──take── Board (actor) ◀──records── rank 0 … rank N-1
             ──wish──▶               ──wish?────▶
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bsq_ray.training.monitoring.prometheus import Gauges
from bsq_ray.training.worker_context import ControlSignal


@dataclass(frozen=True)
class Failure:
    """Why a group of workers ended: the first error in it, the run's step then, and whether trying again is in vain."""

    error: Exception
    step: int
    is_fatal: bool


@dataclass
class WorkerGroupEvents:
    """What has come from the workers.

    Attributes:
        records: of the run's log.
        nodes: where each worker of the group runs, by rank.
        failure: how the group failed, if it did.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    node_ids: dict[int, str] = field(default_factory=dict)
    failure: Failure | None = None


class RunCoordinator:
    """Actor that all groups of workers of a run share, one after the other."""

    def __init__(self) -> None:
        self._events = WorkerGroupEvents()
        self._signal = ControlSignal.CONTINUE
        self._step = 0

    def reset_for_group(self) -> None:
        """Other workers begin; only the wish to stop concerns them too."""
        self._events = WorkerGroupEvents(self._events.records)
        self._step = 0
        self._signal = ControlSignal.STOP if self._signal is ControlSignal.STOP else ControlSignal.CONTINUE

    def register(self, rank: int, node_id: str) -> None:
        """A worker begins."""
        self._events.node_ids[rank] = node_id

    def record(self, record: dict[str, Any]) -> None:
        """A record of the run."""
        self._events.records.append(record)
        self._step = max(self._step, record.get("step", 0))

    def report_failure(self, error: Exception, is_fatal: bool) -> None:
        """A worker failed. Of the failures of a group only the first counts; the others follow from it."""
        if self._events.failure is None:
            self._events.failure = Failure(error, self._step, is_fatal)

    def drain(self) -> WorkerGroupEvents:
        """Everything so far; the same records are not given twice."""
        events = self._events
        self._events = WorkerGroupEvents([], dict(events.node_ids), events.failure)
        return events

    def request(self, signal: ControlSignal) -> None:
        """Sets what the workers shall do; who shall stop needs no lesser wish."""
        self._signal = max(self._signal, signal)

    def control_signal(self) -> ControlSignal:
        """What the workers shall do."""
        return self._signal


class RayReporter:
    """Reports to the board without waiting for it, and to Prometheus.

    Args:
        board: the actor.
        run: folder of the run.
    """

    def __init__(self, coordinator: Any, out_url: str) -> None:
        import ray

        self._wait, self._get = ray.wait, ray.get
        self._coordinator = coordinator
        self._gauges = Gauges(out_url)
        self._pending: Any = None
        self._signal = ControlSignal.CONTINUE

    def record(self, record: dict[str, Any]) -> None:
        """Puts it on the board, and its numbers on this machine's endpoint."""
        self._coordinator.add.remote(record)
        self._gauges.update(record)

    def control_signal(self) -> ControlSignal:
        """The newest answer that has arrived; the next question is already under way."""
        if self._pending is None:
            self._pending = self._coordinator.wish.remote()
        ready, _ = self._wait([self._pending], timeout=0)
        if ready:
            self._signal = self._get(ready[0])
            self._pending = None
        return self._signal
