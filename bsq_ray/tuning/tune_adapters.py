"""Adapters between Ray Tune and the study: searcher, scheduler and callback.

Study ──next_trial──▶ StudySearcher ──config──▶ Tune
      ◀─report, end── StudyCallback ◀─results──
                      GracefulStopScheduler ──request_stop──▶ StopRequests (actor)
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from bsq_ray.runtime._ray_internals import stub_trial, trial_error_text
from bsq_ray.tuning.placement_group_cleanup import remove_orphaned_placement_groups
from bsq_ray.tuning.study import Study, TrialRecord

# Ray needs this long to mark what a killed process owned as dead.
_ORPHAN_DELAY_S = 5.0


class StudySearcher(Searcher):
    """Suggests the study's next trial, with at most `max_concurrent` live trials."""

    def __init__(self, study: Study, max_concurrent: int, stop_event: threading.Event) -> None:
        super().__init__()
        self._study, self._max_concurrent, self._stop_event = study, max_concurrent, stop_event
        self._live_trial_ids: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's number as its configuration; None means later, see Tune's `Searcher`."""
        if self._stop_event.is_set():
            return Searcher.FINISHED
        if len(self._live_trial_ids) >= self._max_concurrent:
            return None
        record = self._study.next_trial()
        if record is None:
            return Searcher.FINISHED
        self._live_trial_ids.add(trial_id)
        return {"number": record.number}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Free the slot of a trial that has ended."""
        self._live_trial_ids.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study's records are in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, see `save`."""


class GracefulStopScheduler(FIFOScheduler):
    """Requests a stop from trials that another scheduler would kill; Tune itself sees only CONTINUE.

        running ──inner scheduler decides STOP──▶ stopping ──trial saves and exits──▶ ended
           ↺ inner scheduler decides CONTINUE         ↺ later results are not shown to the inner scheduler

    Args:
        inner_scheduler: Tune's scheduler. It receives the earlier reports of a resumed sweep, so that it compares new
            trials with all of them.
        request_stop: called with the number of a trial that should stop.
        study: the sweep.
    """

    def __init__(self, inner_scheduler: TrialScheduler, request_stop: Callable[[int], None], study: Study) -> None:
        super().__init__()
        self._inner_scheduler, self._request_stop = inner_scheduler, request_stop
        self._stopping_trial_ids: set[str] = set()
        self._pending_reports = {record.number: list(record.reports) for record in study.unfinished_trials}
        for record in study.ended_trials:
            self._replay(record)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Add a trial, with the reports that it made before the sweep was resumed."""
        self._inner_scheduler.on_trial_add(tune_controller, trial)
        for step, metrics in self._pending_reports.pop(trial.config["number"], []):
            self.on_trial_result(tune_controller, trial, {"step": step, **metrics})

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Let the trial continue; request a stop if the inner scheduler would kill it."""
        # The final result of a trial has no step.
        if trial.trial_id not in self._stopping_trial_ids and "step" in result:
            decision = self._inner_scheduler.on_trial_result(tune_controller, trial, result)
            if decision == TrialScheduler.STOP:
                self._stopping_trial_ids.add(trial.trial_id)
                self._request_stop(trial.config["number"])
        return TrialScheduler.CONTINUE

    def _replay(self, record: TrialRecord) -> None:
        """Show the reports of a trial that has ended to the inner scheduler."""
        trial = stub_trial(f"earlier-{record.number}")
        # Only a decision to pause would use the controller.
        no_controller: Any = None
        self._inner_scheduler.on_trial_add(no_controller, trial)
        for step, metrics in record.reports:
            decision = self._inner_scheduler.on_trial_result(no_controller, trial, {"step": step, **metrics})
            if decision == TrialScheduler.STOP:
                return


def build_scheduler(study: Study, max_steps: int, request_stop: Callable[[int], None]) -> TrialScheduler:
    """Build the sweep's scheduler.

    Args:
        max_steps: the most steps a trial can train.
        request_stop: called with the number of a trial that should stop early.
    """
    scheduler_config, (metric, mode) = study.sweep.scheduler, study.sweep.scheduler_metric
    if scheduler_config.kind == "none":
        return FIFOScheduler()
    if scheduler_config.kind == "asha":
        inner_scheduler: TrialScheduler = AsyncHyperBandScheduler(
            time_attr="step",
            metric=metric,
            mode=mode,
            # Above the last step, so that no trial counts as stopped when it finishes.
            max_t=max(max_steps, scheduler_config.grace_period) + 1,
            grace_period=scheduler_config.grace_period,
            reduction_factor=scheduler_config.reduction_factor,
        )
    else:
        inner_scheduler = MedianStoppingRule(
            time_attr="step",
            metric=metric,
            mode=mode,
            grace_period=scheduler_config.grace_period,
            min_samples_required=scheduler_config.min_samples_required,
            # A paused trial would keep its workers. Tune takes the time since a pause that never was as infinite.
            min_time_slice=math.inf,  # type: ignore[arg-type]
        )
    return GracefulStopScheduler(inner_scheduler, request_stop, study)


class StudyCallback(tune.Callback):
    """Records trials in the study, reports events, and forwards the stop request of the sweep.

    Args:
        stop_event: set when the sweep should save and stop.
        request_stop_all: called once after `stop_event` is set.
        on_event: receives "report", "end", "retry" or "interrupted" with the trial's record.
    """

    def __init__(
        self,
        study: Study,
        stop_event: threading.Event,
        request_stop_all: Callable[[], None],
        on_event: Callable[[str, TrialRecord], None],
    ) -> None:
        self._study, self._stop_event = study, stop_event
        self._request_stop_all, self._on_event = request_stop_all, on_event
        self._stop_forwarded = False
        self._last_failure_time: float | None = None

    def on_trial_result(self, iteration: int, trials: Any, trial: TuneTrial, result: Any, **info: Any) -> None:
        """Record an intermediate evaluation, or the outcome of a trial."""
        record = self._find_record(trial)
        if "step" in result:
            self._study.report(record, result["step"], result["metrics"])
            self._on_event("report", record)
        elif result["state"] == "interrupted":
            self._on_event("interrupted", record)
        else:
            self._study.end(record, result["state"], result["reason"], result["metrics"])
            self._on_event("end", record)

    def on_trial_recover(self, iteration: int, trials: Any, trial: TuneTrial, **info: Any) -> None:
        """Record that a trial failed and is retried."""
        self._last_failure_time = time.monotonic()
        record = self._find_record(trial)
        self._study.record_retry(record, _failure_reason(trial))
        self._on_event("retry", record)

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **info: Any) -> None:
        """Record that a trial failed and is not retried."""
        self._last_failure_time = time.monotonic()
        record = self._find_record(trial)
        self._study.end(record, "failed", _failure_reason(trial))
        self._on_event("end", record)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Forward a stop request, and release resources left by a killed trial."""
        if self._stop_event.is_set() and not self._stop_forwarded:
            self._stop_forwarded = True
            self._request_stop_all()
        if self._last_failure_time is not None and time.monotonic() - self._last_failure_time > _ORPHAN_DELAY_S:
            self._last_failure_time = time.monotonic()
            remove_orphaned_placement_groups()

    def finalize(self) -> None:
        """Release resources left by a trial that was lost at the end of the sweep."""
        if self._last_failure_time is not None:
            time.sleep(max(0.0, self._last_failure_time + _ORPHAN_DELAY_S - time.monotonic()))
            remove_orphaned_placement_groups()

    def _find_record(self, trial: TuneTrial) -> TrialRecord:
        return next(record for record in self._study.records if record.number == trial.config["number"])


def _failure_reason(trial: TuneTrial) -> str:
    """Return the newest failure of a trial in one line."""
    lines = [line.strip() for line in trial_error_text(trial).splitlines() if line.strip()]
    failure_lines = lines[max(index for index, line in enumerate(lines) if line.startswith("Failure #")) :]
    if any("ActorDiedError" in line or "actor died" in line or "actor is dead" in line for line in failure_lines):
        return "the trial's process was lost"
    return failure_lines[-1].removeprefix("RuntimeError: ")
