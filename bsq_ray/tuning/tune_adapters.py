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

from bsq_ray.tuning.placement_group_cleanup import remove_orphaned_groups
from bsq_ray.tuning.study import Record, Study

# Ray needs a moment to see that what a killed process owned is dead.
_ORPHAN_SECONDS = 5.0


class StudySearcher(Searcher):
    """Gives Tune the study's next trial, as long as no more than `concurrency` are under way."""

    def __init__(self, study: Study, concurrency: int, stop: threading.Event) -> None:
        super().__init__()
        self.study, self.concurrency, self.stop = study, concurrency, stop
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """See Tune's `Searcher`; None means later."""
        if self.stop.is_set():
            return Searcher.FINISHED
        if len(self._live) >= self.concurrency:
            return None
        following = self.study.next()
        if following is None:
            return Searcher.FINISHED
        self._live.add(trial_id)
        return {"number": following.number}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Makes room for the next one."""
        self._live.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's records are in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class AskingScheduler(FIFOScheduler):
    """Asks a trial to stop where another scheduler would have it killed.

    Args:
        decides: Tune's scheduler.
        ask: called with the number of a trial that is to stop.
        study: a sweep that goes on; `decides` sees again what its trials have reported, so that it compares with all of
            them.
    """

    def __init__(self, decides: TrialScheduler, ask: Callable[[int], None], study: Study) -> None:
        super().__init__()
        self.decides, self.ask = decides, ask
        self._asked: set[str] = set()
        self._reported = {record.number: list(record.reports) for record in study.going_on}
        for record in study.ended:
            self._show(record)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """See Tune's `TrialScheduler`."""
        self.decides.on_trial_add(tune_controller, trial)
        for step, figures in self._reported.pop(trial.config["number"], []):
            self.on_trial_result(tune_controller, trial, {"reached": step, **figures})

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Lets every trial continue; those that are asked to stop will end by themselves."""
        if trial.trial_id not in self._asked and "reached" in result:
            decision = self.decides.on_trial_result(tune_controller, trial, result)
            if decision == TrialScheduler.STOP:
                self._asked.add(trial.trial_id)
                self.ask(trial.config["number"])
        return TrialScheduler.CONTINUE

    def _show(self, record: Record) -> None:
        trial = TuneTrial("earlier", trial_id=f"earlier-{record.number}", stub=True)
        self.decides.on_trial_add(None, trial)
        for step, figures in record.reports:
            if self.decides.on_trial_result(None, trial, {"reached": step, **figures}) == TrialScheduler.STOP:
                return


def build_scheduler(study: Study, longest: int, ask: Callable[[int], None]) -> TrialScheduler:
    """The sweep's scheduler; `longest` is the most steps a trial can take."""
    section, (metric, direction) = study.sweep.scheduler, study.sweep.watched
    if section.kind == "none":
        return FIFOScheduler()
    if section.kind == "asha":
        decides: TrialScheduler = AsyncHyperBandScheduler(
            time_attr="reached",
            metric=metric,
            mode=direction,
            # Above the last step, so that nobody is "stopped" at the end.
            max_t=max(longest, section.grace_steps) + 1,
            grace_period=section.grace_steps,
            reduction_factor=section.reduction,
        )
    else:
        decides = MedianStoppingRule(
            time_attr="reached",
            metric=metric,
            mode=direction,
            grace_period=section.grace_steps,
            min_samples_required=section.trials_before,
            # It would pause trials to let others catch up, and a paused training holds its workers.
            min_time_slice=float("inf"),
        )
    return AskingScheduler(decides, ask, study)


class Watcher(tune.Callback):
    """Writes down what becomes of the trials, tells `show`, and passes the wish to stop on."""

    def __init__(
        self, study: Study, stop: threading.Event, stop_all: Callable[[], None], show: Callable[[str, Record], None]
    ) -> None:
        self.study, self.stop, self.stop_all, self.show = study, stop, stop_all, show
        self._told = False
        self._lost: float | None = None

    def on_trial_result(self, iteration: int, trials: Any, trial: TuneTrial, result: Any, **info: Any) -> None:
        """An evaluation along the way, or the end of a trial."""
        record = self._record(trial)
        if "reached" in result:
            self.study.report(record, result["reached"], result["figures"])
            self.show("report", record)
        elif result["ending"] == "interrupted":
            self.show("interrupted", record)
        else:
            self.study.end(record, result["ending"], result["reason"], result["figures"])
            self.show("end", record)

    def on_trial_recover(self, iteration: int, trials: Any, trial: TuneTrial, **info: Any) -> None:
        """It failed and is begun again."""
        self._lost = time.monotonic()
        record = self._record(trial)
        self.study.retry(record, _cause(trial))
        self.show("retry", record)

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **info: Any) -> None:
        """It failed for the last time."""
        self._lost = time.monotonic()
        record = self._record(trial)
        self.study.end(record, "failed", _cause(trial))
        self.show("end", record)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Passes the wish to stop on, and frees what a killed trial has left."""
        if self.stop.is_set() and not self._told:
            self._told = True
            self.stop_all()
        if self._lost is not None and time.monotonic() - self._lost > _ORPHAN_SECONDS:
            self._lost = time.monotonic()
            remove_orphaned_groups()

    def settle(self) -> None:
        """At the end: waits until a trial that was lost last has left what it held, and frees it."""
        if self._lost is not None:
            time.sleep(max(0.0, self._lost + _ORPHAN_SECONDS - time.monotonic()))
            remove_orphaned_groups()

    def _record(self, trial: TuneTrial) -> Record:
        return next(record for record in self.study.records if record.number == trial.config["number"])


def _cause(trial: TuneTrial) -> str:
    """Why a trial failed, in one line: the last of what Tune wrote down."""
    lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    failure = lines[max(place for place, line in enumerate(lines) if line.startswith("Failure #")) :]
    if any("ActorDiedError" in line or "actor died" in line or "actor is dead" in line for line in failure):
        return "the trial's process was lost"
    return failure[-1].removeprefix("RuntimeError: ")
