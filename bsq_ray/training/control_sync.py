"""Exchange of flags between all workers, one small collective per step, which no step waits for.

before a step:  every rank: nonfinite gradient? writing a checkpoint?  ─┐
                rank 0: control signal, progress under a time limit    ─┴─ all-reduce max ─┐
after it:       every rank: continue, resize, stop or fail ◀───────────────────────────────┘
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from bsq_ray.training.checkpoints.writer import CheckpointWriter
from bsq_ray.training.deferred_max import DeferredMax
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.worker_context import ControlSignal, WorkerContext


class ControlState(NamedTuple):
    """State of the run, identical on all workers.

    Attributes:
        signal: the control signal of rank 0.
        progress: completed fraction of the run, 0 to 1.
        found_nonfinite: a gradient was not finite before the exchange was sent.
    """

    signal: ControlSignal
    progress: float
    found_nonfinite: bool = False

    @property
    def should_stop(self) -> bool:
        """Return True if the training loop must end after this step."""
        return self.signal > ControlSignal.CONTINUE or self.progress >= 1


class ControlSync:
    """Shares the control signal and the time of rank 0, and the flags of all ranks, once per step."""

    def __init__(self, spec: RunSpec, worker: WorkerContext, checkpoints: CheckpointWriter) -> None:
        self._spec, self._worker, self._checkpoints = spec, worker, checkpoints
        self._exchange = DeferredMax(worker.device, worker.world_size, num_host_values=3)

    def send(self, elapsed_s: float, found_nonfinite: Tensor) -> None:
        """Start the exchange that `receive` returns after the next step; collective.

        Args:
            elapsed_s: training time of the run in seconds, over all worker groups.
            found_nonfinite: scalar on the device, above 0 if a gradient was not finite.
        """
        self._exchange.start(found_nonfinite, self._host_values(elapsed_s))

    def receive(self, step: int, elapsed_s: float) -> ControlState:
        """Return the state that was sent before the last step; collective.

        A single worker need not agree with others, so its signal and its time are the newest ones. Advance the
        checkpoint in progress if no worker is writing it.

        Args:
            step: number of completed steps.
            elapsed_s: training time of the run in seconds, over all worker groups.

        Raises:
            RuntimeError: a checkpoint could not be written.
        """
        found_nonfinite, *host_values = self._exchange.finish()
        if self._worker.world_size == 1:
            host_values = self._host_values(elapsed_s)
        signal, time_fraction, any_busy = host_values
        if not any_busy:
            self._checkpoints.advance()
        progress = max(self._step_fraction(step), time_fraction)
        return ControlState(ControlSignal(int(signal)), min(1.0, progress), found_nonfinite > 0)

    def progress(self, step: int, elapsed_s: float) -> float:
        """Return the completed fraction of the run, 0 to 1, for the same step and time on all workers."""
        return min(1.0, max(self._step_fraction(step), self._time_fraction(elapsed_s)))

    def _host_values(self, elapsed_s: float) -> list[float]:
        """Return control signal, fraction of the time limit, and whether a checkpoint is being written."""
        signal, time_fraction = ControlSignal.CONTINUE, 0.0
        if self._worker.is_main:
            signal, time_fraction = self._worker.reporter.control_signal(), self._time_fraction(elapsed_s)
        return [float(signal), time_fraction, float(self._checkpoints.is_busy)]

    def _step_fraction(self, step: int) -> float:
        return step / self._spec.config.training.steps

    def _time_fraction(self, elapsed_s: float) -> float:
        return elapsed_s / (60 * self._spec.minutes) if self._spec.minutes is not None else 0.0
