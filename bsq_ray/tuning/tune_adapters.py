"""What Ray Tune asks during a sweep, answered by the study: what to try next, whom to stop, and what became of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from bsq_ray.tuning.placement_group_cleanup import remove_orphaned_placement_groups
from bsq_ray.tuning.study import Study, TrialRecord

# Ray needs a moment to see that what a killed process owned is dead.
_ORPHAN_DELAY_S = 5.0


class StudySearcher(Searcher):
    """Gives Tune the study's next trial, as long as no more than `concurrency` are under way."""

    def __init__(self, study: Study, max_concurrent: int, stop_event: threading.Event) -> None:
        super().__init__()
        self.study, self.max_concurrent, self.stop_event = study, max_concurrent, stop_event
        self._live_trial_ids: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """See Tune's `Searcher`; None means later."""
        if self.stop_event.is_set():
            return Searcher.FINISHED
        if len(self._live_trial_ids) >= self.max_concurrent:
            return None
        record = self.study.next_trial()
        if record is None:
            return Searcher.FINISHED
        self._live_trial_ids.add(trial_id)
        return {"number": record.number}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Makes room for the next one."""
        self._live_trial_ids.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's records are in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class GracefulStopScheduler(FIFOScheduler):
    """Asks a trial to stop where another scheduler would have it killed.

    Args:
        decides: Tune's scheduler.
        ask: called with the number of a trial that is to stop.
        study: a sweep that goes on; `decides` sees again what its trials have reported, so that it compares with all of
            them.
    """

    def __init__(self, inner_scheduler: TrialScheduler, request_stop: Callable[[int], None], study: Study) -> None:
        super().__init__()
        self.inner_scheduler, self.request_stop = inner_scheduler, request_stop
        self._stopping_trial_ids: set[str] = set()
        self._pending_reports = {record.number: list(record.reports) for record in study.unfinished_trials}
        for record in study.ended_trials:
            self._replay(record)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """See Tune's `TrialScheduler`."""
        self.inner_scheduler.on_trial_add(tune_controller, trial)
        for step, metrics in self._pending_reports.pop(trial.config["number"], []):
            self.on_trial_result(tune_controller, trial, {"reached": step, **metrics})

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Lets every trial continue; those that are asked to stop will end by themselves."""
        if trial.trial_id not in self._stopping_trial_ids and "reached" in result:
            decision = self.inner_scheduler.on_trial_result(tune_controller, trial, result)
            if decision == TrialScheduler.STOP:
                self._stopping_trial_ids.add(trial.trial_id)
                self.request_stop(trial.config["number"])
        return TrialScheduler.CONTINUE

    def _replay(self, record: TrialRecord) -> None:
        trial = TuneTrial("earlier", trial_id=f"earlier-{record.number}", stub=True)
        self.inner_scheduler.on_trial_add(None, trial)
        for step, metrics in record.reports:
            if self.inner_scheduler.on_trial_result(None, trial, {"reached": step, **metrics}) == TrialScheduler.STOP:
                return


def build_scheduler(study: Study, max_steps: int, request_stop: Callable[[int], None]) -> TrialScheduler:
    """The sweep's scheduler; `longest` is the most steps a trial can take."""
    scheduler_config, (metric, mode) = study.sweep.scheduler, study.sweep.scheduler_metric
    if scheduler_config.kind == "none":
        return FIFOScheduler()
    if scheduler_config.kind == "asha":
        inner_scheduler: TrialScheduler = AsyncHyperBandScheduler(
            time_attr="reached",
            metric=metric,
            mode=mode,
            # Above the last step, so that nobody is "stopped" at the end.
            max_t=max(max_steps, scheduler_config.grace_period) + 1,
            grace_period=scheduler_config.grace_period,
            reduction_factor=scheduler_config.reduction_factor,
        )
    else:
        inner_scheduler = MedianStoppingRule(
            time_attr="reached",
            metric=metric,
            mode=mode,
            grace_period=scheduler_config.grace_period,
            min_samples_required=scheduler_config.min_samples_required,
            # It would pause trials to let others catch up, and a paused training holds its workers.
            min_time_slice=float("inf"),
        )
    return GracefulStopScheduler(inner_scheduler, request_stop, study)


class StudyCallback(tune.Callback):
    """Writes down what becomes of the trials, tells `show`, and passes the wish to stop on."""

    def __init__(
        self,
        study: Study,
        stop_event: threading.Event,
        request_stop_all: Callable[[], None],
        on_event: Callable[[str, TrialRecord], None],
    ) -> None:
        self.study, self.stop_event, self.request_stop_all, self.on_event = (
            study,
            stop_event,
            request_stop_all,
            on_event,
        )
        self._stop_forwarded = False
        self._last_failure_time: float | None = None

    def on_trial_result(self, iteration: int, trials: Any, trial: TuneTrial, result: Any, **info: Any) -> None:
        """An evaluation along the way, or the end of a trial."""
        record = self._find_record(trial)
        if "reached" in result:
            self.study.report(record, result["reached"], result["figures"])
            self.on_event("report", record)
        elif result["ending"] == "interrupted":
            self.on_event("interrupted", record)
        else:
            self.study.end(record, result["ending"], result["reason"], result["figures"])
            self.on_event("end", record)

    def on_trial_recover(self, iteration: int, trials: Any, trial: TuneTrial, **info: Any) -> None:
        """It failed and is begun again."""
        self._last_failure_time = time.monotonic()
        record = self._find_record(trial)
        self.study.record_retry(record, _failure_reason(trial))
        self.on_event("retry", record)

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **info: Any) -> None:
        """It failed for the last time."""
        self._last_failure_time = time.monotonic()
        record = self._find_record(trial)
        self.study.end(record, "failed", _failure_reason(trial))
        self.on_event("end", record)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Passes the wish to stop on, and frees what a killed trial has left."""
        if self.stop_event.is_set() and not self._stop_forwarded:
            self._stop_forwarded = True
            self.request_stop_all()
        if self._last_failure_time is not None and time.monotonic() - self._last_failure_time > _ORPHAN_DELAY_S:
            self._last_failure_time = time.monotonic()
            remove_orphaned_placement_groups()

    def finalize(self) -> None:
        """At the end: waits until a trial that was lost last has left what it held, and frees it."""
        if self._last_failure_time is not None:
            time.sleep(max(0.0, self._last_failure_time + _ORPHAN_DELAY_S - time.monotonic()))
            remove_orphaned_placement_groups()

    def _find_record(self, trial: TuneTrial) -> TrialRecord:
        return next(record for record in self.study.records if record.number == trial.config["number"])


def _failure_reason(trial: TuneTrial) -> str:
    """Why a trial failed, in one line: the last of what Tune wrote down."""
    lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    failure_lines = lines[max(index for index, line in enumerate(lines) if line.startswith("Failure #")) :]
    if any("ActorDiedError" in line or "actor died" in line or "actor is dead" in line for line in failure_lines):
        return "the trial's process was lost"
    return failure_lines[-1].removeprefix("RuntimeError: ")
