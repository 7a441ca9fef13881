"""Agreement of all workers on how to continue after a step.

rank 0: control signal, progress ─┐
every rank: checkpoint busy?     ─┴─ all-reduce max ─▶ every rank: continue, resize or stop
"""

from __future__ import annotations

from typing import NamedTuple

from bsq_ray.training.checkpoints.writer import CheckpointWriter
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.worker_context import ControlSignal, WorkerContext


class ControlState(NamedTuple):
    """Decision that all workers agreed on.

    Attributes:
        signal: the control signal of rank 0.
        progress: fraction of the run that is done, 0 to 1.
    """

    signal: ControlSignal
    progress: float

    @property
    def should_stop(self) -> bool:
        """Return True if the training loop ends after this step."""
        return self.signal > ControlSignal.CONTINUE or self.progress >= 1


class ControlSync:
    """Shares rank 0's control signal and progress with all workers, once per step."""

    def __init__(self, spec: RunSpec, worker: WorkerContext, checkpoints: CheckpointWriter) -> None:
        self._spec, self._worker, self._checkpoints = spec, worker, checkpoints

    def sync(self, step: int, elapsed: float) -> ControlState:
        """Agree on the next action, and advance the checkpoint in progress once no worker is writing; collective.

        Args:
            step: steps taken.
            elapsed: seconds of training, over all parts of the run.

        Raises:
            RuntimeError: a checkpoint could not be written.
        """
        signal, progress = ControlSignal.CONTINUE, 0.0
        if self._worker.is_main:
            signal = self._worker.reporter.control_signal()
            progress = step / self._spec.config.training.steps
            if self._spec.minutes is not None:
                progress = max(progress, elapsed / (60 * self._spec.minutes))
        is_writing = float(self._checkpoints.is_busy)
        max_signal, progress, is_writing = self._worker.all_reduce_max([signal, min(1.0, progress), is_writing])
        if not is_writing:
            self._checkpoints.advance()
        return ControlState(ControlSignal(int(max_signal)), progress)
