"""State of a sweep: one record per trial, and the Optuna study that proposes parameters.

    out/trials/003/trial.json   TrialRecord: parameters, state, metrics, attempts, reason of a failure
    out/trials/003/preset.yaml  the trial as a preset, next to the files of its training run

A stopped sweep resumes from the records alone: the Optuna study is rebuilt from them, and nothing is unpickled.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bsq_ray import config, storage
from bsq_ray.config.loader import load_config
from bsq_ray.tuning.space import Changes, preset_text
from bsq_ray.tuning.sweep_config import SweepConfig

# running: started and not ended; stopped: early, by the scheduler; invalid: an invalid configuration; diverged: a loss
# is not finite; failed: any other error, after its retries.
TrialRecordState = Literal["running", "finished", "stopped", "invalid", "diverged", "failed"]
# States that a resumed sweep runs again.
_RETRYABLE_STATES = ("running", "failed")


@dataclass
class TrialRecord:
    """Record of one trial.

    Attributes:
        number: index in the sweep, from 0.
        parameters: sampled values, by their names in the space.
        state: see `TrialRecordState`.
        metrics: metrics of the newest evaluation.
        reports: (step, metrics) of every evaluation during training.
        num_attempts: number of times it was started.
        reason: reason of its state; empty if it finished.
        retry_reasons: reason of each retry.
    """

    number: int
    parameters: dict[str, Any]
    state: TrialRecordState = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    reports: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    num_attempts: int = 1
    reason: str = ""
    retry_reasons: list[str] = field(default_factory=list)


class Study:
    """Trials of a sweep.

    Args:
        out_url: folder of the sweep; trials that it contains are continued.
    """

    def __init__(self, sweep: SweepConfig, out_url: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.out_url = sweep, out_url
        self.distributions = {name: parameter.distribution() for name, parameter in sweep.space.items()}
        directions = ["minimize" if mode == "min" else "maximize" for mode in sweep.metrics.values()]
        self._optuna_study = optuna.create_study(directions=directions)
        self.records = read_records(out_url)
        self._optuna_trials: dict[int, Any] = {}
        self._pending_records = [record for record in self.records if record.state in _RETRYABLE_STATES]
        for record in self.records:
            if record not in self._pending_records:
                self._tell_optuna(record)

    @property
    def ended_trials(self) -> list[TrialRecord]:
        """Trials that ended before the sweep was resumed and do not run again."""
        return [record for record in self.records if record.state not in _RETRYABLE_STATES]

    @property
    def unfinished_trials(self) -> list[TrialRecord]:
        """Trials that resume from their newest checkpoint."""
        return list(self._pending_records)

    @property
    def num_remaining(self) -> int:
        """Number of trials that are still to run, including those that run again."""
        return len(self._pending_records) + max(0, self.sweep.num_trials - len(self.records))

    def next_trial(self) -> TrialRecord | None:
        """Return the next trial, with its configuration written into its folder; None if none remains.

        Invalid combinations are recorded and skipped.
        """
        while True:
            if self._pending_records:
                record = self._pending_records.pop(0)
                record.state, record.reason, record.num_attempts = "running", "", record.num_attempts + 1
                self._optuna_trials[record.number] = self._ask_optuna(record.number, record.parameters)
                for step, metrics in record.reports:
                    self._report_to_optuna(record, step, metrics)
            elif (number := self._next_number()) < self.sweep.num_trials:
                self._optuna_trials[number] = self._ask_optuna(number, self._grid_point(number))
                params = self._optuna_trials[number].params
                record = TrialRecord(number, {name: params[name] for name in self.sweep.space})
                self.records = sorted([*self.records, record], key=lambda each: each.number)
                url = self.preset_url(record)
                storage.write_text(url, self.to_preset(record, f"{self.sweep.name}-{number:03}"))
            else:
                return None
            self._save(record)
            try:
                run_config = load_config(self.preset_url(record))
                storage.write_text(config_url(self.trial_url(record)), config.dump_config(run_config))
                return record
            except ValueError as error:
                self.end(record, "invalid", str(error).removeprefix(f"{self.preset_url(record)}: "))

    def report(self, record: TrialRecord, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation during training."""
        reported_steps = {reported_step for reported_step, _ in record.reports}
        # Steps repeated after a failure replace their reports; Optuna keeps the first report of a step.
        record.reports = [*(report for report in record.reports if report[0] < step), (step, metrics)]
        record.metrics = metrics
        if step not in reported_steps:
            self._report_to_optuna(record, step, metrics)
        self._save(record)

    def record_retry(self, record: TrialRecord, reason: str) -> None:
        """Record that a trial failed and is retried."""
        record.num_attempts += 1
        record.retry_reasons.append(reason)
        self._save(record)

    def end(
        self, record: TrialRecord, state: TrialRecordState, reason: str = "", metrics: dict[str, float] | None = None
    ) -> None:
        """Record that a trial has ended, in any state but "running"."""
        from optuna.trial import TrialState

        record.metrics = metrics or record.metrics
        missing_metrics = [name for name in self.sweep.metrics if not math.isfinite(record.metrics.get(name, math.nan))]
        if state == "finished" and missing_metrics:
            state, reason = "failed", f"it has no finite {' and no finite '.join(missing_metrics)}"
        record.state, record.reason = state, reason
        optuna_trial = self._optuna_trials.pop(record.number)
        if state == "finished":
            self._optuna_study.tell(optuna_trial, [record.metrics[name] for name in self.sweep.metrics])
        else:
            self._optuna_study.tell(optuna_trial, state=TrialState.PRUNED if state == "stopped" else TrialState.FAIL)
        self._save(record)

    def best_trial(self) -> TrialRecord | None:
        """Return the finished trial with the best first metric."""
        name, mode = self.sweep.first_metric
        finished_records = [record for record in self.records if record.state == "finished"]
        return (min if mode == "min" else max)(finished_records, key=lambda r: r.metrics[name], default=None)

    def importances(self) -> dict[str, float]:
        """Return the share of the first metric's variance that each parameter explains.

        Method: fANOVA (Hutter et al., ICML 2014), over finished trials.
        Empty if fewer than four trials finished, or if their parameters or metrics do not differ.
        """
        import optuna

        finished_records = [record for record in self.records if record.state == "finished"]
        varied_parameters = [
            name for name in self.sweep.space if len({str(record.parameters[name]) for record in finished_records}) > 1
        ]
        name, _ = self.sweep.first_metric
        if (
            len(finished_records) < 4
            or not varied_parameters
            or len({record.metrics[name] for record in finished_records}) < 2
        ):
            return {}
        return dict(
            optuna.importance.get_param_importances(
                self._optuna_study,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                params=varied_parameters,
                target=lambda trial: trial.values[0],
            )
        )

    def to_preset(
        self, record: TrialRecord, name: str, comments: Iterable[str] = (), *, include_steps: bool = True
    ) -> str:
        """Return the trial as a preset, with the sweep's budget of steps if `include_steps`."""
        sweep = self.sweep
        values_text = ", ".join(f"{key} {format_value(value)}" for key, value in record.parameters.items())
        changes: Changes = dict(sweep.overrides)
        for key, choice in record.parameters.items():
            changes |= sweep.space[key].to_changes(key, choice)
        if include_steps and sweep.budget.steps is not None:
            changes["training.steps"] = sweep.budget.steps
        description = f"{sweep.name}, trial {record.number}: {values_text}"
        return preset_text(sweep.preset, name, description, changes, [*comments])

    def trial_url(self, record: TrialRecord) -> str:
        """Return the folder of a trial."""
        return trial_url(self.out_url, record.number)

    def preset_url(self, record: TrialRecord) -> str:
        """Return the URL of the trial's preset."""
        return storage.join(self.trial_url(record), "preset.yaml")

    def _report_to_optuna(self, record: TrialRecord, step: int, metrics: dict[str, float]) -> None:
        """Report an evaluation to Optuna, which supports intermediate values for a single metric only."""
        value = metrics.get(self.sweep.first_metric[0], math.nan)
        if len(self.sweep.metrics) == 1 and math.isfinite(value):
            self._optuna_trials[record.number].report(value, step)

    def _save(self, record: TrialRecord) -> None:
        url = storage.join(self.trial_url(record), "trial.json")
        storage.write_text(url, json.dumps(asdict(record), indent=1))

    def _next_number(self) -> int:
        """Return the smallest unused number, so that a trial whose folder was removed runs again."""
        used_numbers = {record.number for record in self.records}
        return next(number for number in itertools.count() if number not in used_numbers)

    def _grid_point(self, number: int) -> dict[str, Any] | None:
        """Return the combination of a grid with this index; None for other searchers."""
        if self.sweep.searcher != "grid":
            return None
        value_lists = [parameter.grid_values() for parameter in self.sweep.space.values()]
        combination = next(itertools.islice(itertools.product(*value_lists), number, None))
        return dict(zip(self.sweep.space, combination, strict=True))

    def _ask_optuna(self, number: int, values: dict[str, Any] | None) -> Any:
        """Return an Optuna trial with these values, or with values proposed by the sampler."""
        from optuna.samplers import RandomSampler, TPESampler

        # The trial number is part of the seed, so that a resumed sweep does not repeat samples.
        seed = self.sweep.seed * 100_003 + number
        if self.sweep.searcher == "tpe":
            # Running trials count as bad, so that concurrent trials are spread out.
            self._optuna_study.sampler = TPESampler(seed=seed, constant_liar=True)
        else:
            self._optuna_study.sampler = RandomSampler(seed=seed)
        if values is not None:
            self._optuna_study.enqueue_trial(values)
        return self._optuna_study.ask(self.distributions)

    def _tell_optuna(self, record: TrialRecord) -> None:
        """Add a trial that ended before to the Optuna study."""
        from optuna.trial import TrialState, create_trial

        name, _ = self.sweep.first_metric
        reports = record.reports if len(self.sweep.metrics) == 1 else []
        optuna_state = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}.get(
            record.state, TrialState.FAIL
        )
        values = [record.metrics[metric] for metric in self.sweep.metrics] if record.state == "finished" else None
        self._optuna_study.add_trial(
            create_trial(
                state=optuna_state,
                params=record.parameters,
                distributions=self.distributions,
                values=values,
                intermediate_values={step: metrics[name] for step, metrics in reports if name in metrics},
            )
        )


def trial_url(out_url: str, number: int) -> str:
    """Return the folder of a trial."""
    return storage.join(out_url, "trials", f"{number:03}")


def config_url(folder: str) -> str:
    """Return the URL of a trial's complete configuration."""
    return storage.join(folder, "config.yaml")


def read_records(out_url: str) -> list[TrialRecord]:
    """Read the trials in a folder, ordered by number.

    Raises:
        ValueError: a record is damaged.
    """
    root = storage.join(out_url, "trials")
    records = []
    for name in storage.list_folder(root):
        url = storage.join(root, name, "trial.json")
        if not storage.exists(url):
            continue
        try:
            values = json.loads(storage.read_bytes(url))
            values["reports"] = [(step, metrics) for step, metrics in values["reports"]]
            records.append(TrialRecord(**values))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{url} is damaged ({error}); remove the folder {root}/{name} to run the trial again"
            ) from error
    return sorted(records, key=lambda record: record.number)


def format_value(value: Any) -> str:
    """Format a parameter or metric for display."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
