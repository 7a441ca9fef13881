"""Synchronize all workers after each step: continue, resize or stop.

rank 0: control signal, progress ─┐
every rank: writing checkpoint?  ─┴─ all-reduce max ─▶ every rank: continue, resize or stop
"""

from __future__ import annotations

from typing import NamedTuple

from bsq_ray.training.checkpoints.writer import CheckpointWriter
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.worker_context import ControlSignal, WorkerContext


class ControlState(NamedTuple):
    """Control signal and progress, identical on all workers.

    Attributes:
        signal: the control signal of rank 0.
        progress: completed fraction of the run, 0 to 1.
    """

    signal: ControlSignal
    progress: float

    @property
    def should_stop(self) -> bool:
        """Return True if the training loop must end after this step."""
        return self.signal > ControlSignal.CONTINUE or self.progress >= 1


class ControlSync:
    """Shares the control signal and progress of rank 0 with all workers, once per step."""

    def __init__(self, spec: RunSpec, worker: WorkerContext, checkpoints: CheckpointWriter) -> None:
        self._spec, self._worker, self._checkpoints = spec, worker, checkpoints

    def sync(self, step: int, elapsed_s: float) -> ControlState:
        """Return the control state of all workers; collective.

        Advance the checkpoint in progress if no worker is writing it.

        Args:
            step: number of completed steps.
            elapsed_s: training time of the run in seconds, over all worker groups.

        Raises:
            RuntimeError: a checkpoint could not be written.
        """
        signal, progress = ControlSignal.CONTINUE, 0.0
        if self._worker.is_main:
            signal = self._worker.reporter.control_signal()
            progress = step / self._spec.config.training.steps
            if self._spec.minutes is not None:
                progress = max(progress, elapsed_s / (60 * self._spec.minutes))
        is_busy = float(self._checkpoints.is_busy)
        max_signal, progress, any_busy = self._worker.all_reduce_max([signal, min(1.0, progress), is_busy])
        if not any_busy:
            self._checkpoints.advance()
        return ControlState(ControlSignal(int(max_signal)), progress)
