"""Ray actor that forwards records from the workers to the driver, and control signals from the driver to the workers.

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
        error: the error; it can be unpickled in another process.
        step: last recorded step of the group when the error was reported.
        is_fatal: True if the error is not retryable.
    """

    error: Exception
    step: int
    is_fatal: bool


@dataclass
class WorkerGroupEvents:
    """Events of the current worker group.

    Attributes:
        records: run records since the last `drain`.
        node_ids: node id of each started worker, by rank.
        failure: first error of the group; None if there is none.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    node_ids: dict[int, str] = field(default_factory=dict)
    failure: Failure | None = None


class RunCoordinator:
    """Ray actor that outlives the worker groups of a run and serves one group at a time."""

    def __init__(self) -> None:
        self._events = WorkerGroupEvents()
        self._signal = ControlSignal.CONTINUE
        self._step = 0

    def reset_for_group(self) -> None:
        """Reset for a new worker group: keep pending records and a stop request, drop a resize request."""
        self._events = WorkerGroupEvents(self._events.records)
        self._step = 0
        self._signal = ControlSignal.STOP if self._signal is ControlSignal.STOP else ControlSignal.CONTINUE

    def register(self, rank: int, node_id: str) -> None:
        """Register a started worker."""
        self._events.node_ids[rank] = node_id

    def record(self, record: dict[str, Any]) -> None:
        """Store a run record until the driver drains it."""
        self._events.records.append(record)
        self._step = max(self._step, record.get("step", 0))

    def report_failure(self, error: Exception, is_fatal: bool) -> None:
        """Store the first error of the group; later errors are usually its consequences."""
        if self._events.failure is None:
            self._events.failure = Failure(error, self._step, is_fatal)

    def drain(self) -> WorkerGroupEvents:
        """Return all events and clear the records, so that each record is returned once."""
        events = self._events
        self._events = WorkerGroupEvents([], dict(events.node_ids), events.failure)
        return events

    def request(self, signal: ControlSignal) -> None:
        """Set the workers' control signal, unless a stronger one is already set."""
        self._signal = max(self._signal, signal)

    def control_signal(self) -> ControlSignal:
        """Return the workers' control signal."""
        return self._signal


class RayReporter:
    """Reporter of rank 0: sends records to the coordinator asynchronously, and metrics to Prometheus.

    Args:
        coordinator: handle of the `RunCoordinator` actor.
        out_url: run folder, used as the label of the Prometheus metrics.
    """

    def __init__(self, coordinator: Any, out_url: str) -> None:
        self._coordinator = coordinator
        self._gauges = Gauges(out_url, self._warn)
        self._pending: Any = None
        self._signal = ControlSignal.CONTINUE

    def record(self, record: dict[str, Any]) -> None:
        """Send a record to the coordinator, and its metrics to the Prometheus endpoint of the node."""
        self._coordinator.record.remote(record)
        self._gauges.update(record)

    def _warn(self, text: str) -> None:
        self._coordinator.record.remote({"kind": "warning", "step": 0, "text": text})

    def control_signal(self) -> ControlSignal:
        """Return the last received signal without blocking, and request the next one."""
        import ray

        if self._pending is None:
            self._pending = self._coordinator.control_signal.remote()
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready:
            self._signal = ray.get(ready[0])
            self._pending = None
        return self._signal
