"""Actor between the workers of a Ray run and the driver: records one way, control signals the other.

driver ◀──drain──── RunCoordinator (actor) ◀──record, report_failure── rank 0 … rank N-1
       ──request──▶                        ──control_signal──────────▶
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bsq_ray.training.monitoring.prometheus import Gauges
from bsq_ray.training.worker_context import ControlSignal


@dataclass(frozen=True)
class Failure:
    """First error of a worker group.

    Attributes:
        error: the error, in a form that another process can unpickle.
        step: step of the run at that time.
        is_fatal: not retryable.
    """

    error: Exception
    step: int
    is_fatal: bool


@dataclass
class WorkerGroupEvents:
    """Events of the current worker group.

    Attributes:
        records: run records since the last `drain`.
        node_ids: node of each worker that has started, by rank.
        failure: first error of the group; None if there is none.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    node_ids: dict[int, str] = field(default_factory=dict)
    failure: Failure | None = None


class RunCoordinator:
    """Actor shared by all worker groups of a run, one group at a time."""

    def __init__(self) -> None:
        self._events = WorkerGroupEvents()
        self._signal = ControlSignal.CONTINUE
        self._step = 0

    def reset_for_group(self) -> None:
        """Prepare for a new worker group; a stop request stays in force, a resize request does not."""
        self._events = WorkerGroupEvents(self._events.records)
        self._step = 0
        self._signal = ControlSignal.STOP if self._signal is ControlSignal.STOP else ControlSignal.CONTINUE

    def register(self, rank: int, node_id: str) -> None:
        """Register a worker that has started."""
        self._events.node_ids[rank] = node_id

    def record(self, record: dict[str, Any]) -> None:
        """Store a run record until the driver drains it."""
        self._events.records.append(record)
        self._step = max(self._step, record.get("step", 0))

    def report_failure(self, error: Exception, is_fatal: bool) -> None:
        """Store the error of a worker; only the first of a group counts, because the others follow from it."""
        if self._events.failure is None:
            self._events.failure = Failure(error, self._step, is_fatal)

    def drain(self) -> WorkerGroupEvents:
        """Return all events so far and forget the records, so that each record is returned once."""
        events = self._events
        self._events = WorkerGroupEvents([], dict(events.node_ids), events.failure)
        return events

    def request(self, signal: ControlSignal) -> None:
        """Set the workers' control signal; a stronger signal that was set before stays."""
        self._signal = max(self._signal, signal)

    def control_signal(self) -> ControlSignal:
        """Return the workers' control signal."""
        return self._signal


class RayReporter:
    """Reporter of rank 0: sends records to the coordinator without waiting for it, and to Prometheus.

    Args:
        coordinator: handle of the `RunCoordinator` actor.
        out_url: folder of the run, the label of its Prometheus metrics.
    """

    def __init__(self, coordinator: Any, out_url: str) -> None:
        self._coordinator = coordinator
        self._gauges = Gauges(out_url)
        self._pending: Any = None
        self._signal = ControlSignal.CONTINUE

    def record(self, record: dict[str, Any]) -> None:
        """Send a record to the coordinator and its numbers to the node's Prometheus endpoint."""
        self._coordinator.record.remote(record)
        self._gauges.update(record)

    def control_signal(self) -> ControlSignal:
        """Return the newest signal that has arrived, without waiting, and request the next one."""
        import ray

        if self._pending is None:
            self._pending = self._coordinator.control_signal.remote()
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready:
            self._signal = ray.get(ready[0])
            self._pending = None
        return self._signal
