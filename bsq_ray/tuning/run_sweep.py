"""A sweep: many trainings with different values of the configuration, each one on its share of the cluster.

sweep.yaml ─▶ Study ─values─▶ Tune ─▶ Trial ─▶ Ray Train's workers
                ▲                      │
                └──figures, endings────┘        ─▶ results.parquet, README.md, best.yaml, plots
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from bsq_ray import storage
from bsq_ray.config.loader import load_config
from bsq_ray.data.factory import build_source
from bsq_ray.runtime.ray_session import max_cluster_resources, ray_session
from bsq_ray.runtime.signals import stop_on_signal
from bsq_ray.training.launch import Interrupted
from bsq_ray.training.ray_trainer import ResourceBudget, ray_storage_options, should_use_gpus
from bsq_ray.training.worker_context import Device
from bsq_ray.tuning.results import write_results
from bsq_ray.tuning.study import Study, TrialRecord
from bsq_ray.tuning.sweep_config import BudgetConfig, SweepConfig

# A trial's own process, beside its workers.
_TRIAL_CPUS = 0.1
# CPUs that stay free for the tasks that read data.
_DATA_TASK_CPUS = 1.0
# What Ray and Tune read when they start: no log files and no words of their own, and Ctrl-C is not theirs. A trial has
# many small processes, which is no reason for a warning.
_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started",
}
# Keys of a sweep that may change when it goes on.
_MUTABLE_KEYS = {"description", "budget"}
_FIXED_BUDGET_KEYS = ("steps", "minutes")


@dataclass(frozen=True)
class SweepResult:
    """What came of it."""

    study: Study
    best: TrialRecord


def run_sweep(
    sweep: SweepConfig,
    data_url: str,
    held_out_url: str,
    out_url: str,
    resume: bool = False,
    address: str | None = None,
    device: Device = "auto",
    stop_after_minutes: float | None = None,
    on_event: Callable[[str, TrialRecord, Study], None] = lambda event, record, study: None,
) -> SweepResult:
    """Runs the trials that are not done yet and writes the results into `out_url`.

    Args:
        data_url: what the trials train on.
        held_out_url: what they are measured on.
        resume: go on with the sweep in `out_url`.
        stop_after: minutes after which it saves and stops, as at Ctrl-C; None runs all trials.
        show: hears of every event ("report", "end", "retry", "interrupted") with its trial.

    Raises:
        ValueError: sweep, data and folder do not fit together; nothing was started.
        Interrupted: it was stopped and can go on.
        RuntimeError: no trial finished.
    """
    data_url, held_out_url, out_url = map(storage.absolute, (data_url, held_out_url, out_url))
    run_config = load_config(sweep.preset)
    for url in (data_url, held_out_url):
        if not build_source(run_config, url).num_samples:
            raise ValueError(f"{url} holds no samples")
    _claim_folder(sweep, data_url, held_out_url, out_url, resume)
    study = Study(sweep, out_url)
    max_steps = sweep.budget.steps or run_config.training.steps
    os.environ.update(_TUNE_ENV)
    with ray_session(address), stop_on_signal() as stop_event:
        if study.num_remaining:
            timer = threading.Timer(60 * stop_after_minutes, stop_event.set) if stop_after_minutes is not None else None
            if timer:
                timer.daemon = True
                timer.start()
            _run_tune(study, data_url, held_out_url, device, max_steps, stop_event, on_event)
            if timer:
                timer.cancel()
    write_results(study)
    if study.num_remaining or any(record.state == "running" for record in study.records):
        num_ended = sum(record.state != "running" for record in study.records)
        raise Interrupted(f"stopped after {num_ended} of {sweep.num_trials} trials; results so far are in {out_url}")
    best = study.best_trial()
    if best is None:
        reason = next((f"; trial {r.number}: {r.reason}" for r in study.records if r.reason), "")
        raise RuntimeError(f"no trial of {sweep.num_trials} finished{reason}")
    return SweepResult(study, best)


def _claim_folder(sweep: SweepConfig, data_url: str, held_out_url: str, out_url: str, resume: bool) -> None:
    """Notes in the folder what its sweep is, and refuses another one."""
    url = storage.join(out_url, "sweep.yaml")
    current = {**sweep.model_dump(mode="json", exclude_none=True), "data": data_url, "held_out": held_out_url}
    if storage.exists(url):
        previous = _read_sweep_file(url)
        differing_keys = [
            key
            for key in sorted(previous.keys() | current.keys())
            if _fixed_value(previous, key) != _fixed_value(current, key)
        ]
        if differing_keys:
            raise ValueError(
                f"{out_url} holds another sweep ({', '.join(differing_keys)} differ); give the same values, or another --out"
            )
        if not resume:
            raise ValueError(f"{out_url} already holds this sweep; go on with it by --resume, or choose another --out")
    elif storage.list_folder(out_url):
        raise ValueError(f"{out_url} is not empty and holds no sweep; choose another --out")
    storage.write_bytes(url, yaml.safe_dump(current, sort_keys=False).encode())


def _read_sweep_file(url: str) -> dict[str, Any]:
    """What a folder's sweep is.

    Raises:
        ValueError: the note is damaged.
    """
    try:
        values = yaml.safe_load(storage.read_bytes(url))
    except yaml.YAMLError:
        values = None
    if isinstance(values, dict) and all(isinstance(values.get(section), dict) for section in ("budget", "metrics")):
        return values
    raise ValueError(f"{url} is damaged and does not say which sweep is there; put it right, or choose another --out")


def _fixed_value(values: Mapping[str, Any], key: str) -> Any:
    """What must stay the same when a sweep goes on."""
    if key == "budget":
        return {name: values.get(key, {}).get(name) for name in _FIXED_BUDGET_KEYS}
    if key == "metrics":
        # Their order matters: the first one says which trial is the best.
        return list(values.get(key, {}).items())
    return None if key in _MUTABLE_KEYS else values.get(key)


def _run_tune(
    study: Study,
    data_url: str,
    held_out_url: str,
    device: Device,
    max_steps: int,
    stop_event: threading.Event,
    on_event: Callable[[str, TrialRecord, Study], None],
) -> None:
    """Runs what is left of the study with Ray Tune."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    import ray
    from ray import tune

    from bsq_ray.tuning.trial import StopRequests, SweepTrainable, TrialContext
    from bsq_ray.tuning.tune_adapters import StudyCallback, StudySearcher, build_scheduler

    budget = study.sweep.budget
    cluster_resources = max_cluster_resources()
    if budget.resources:
        use_gpu = budget.resources.get("GPU", 0.0) > 0
    else:
        use_gpu = should_use_gpus(device, budget.workers, cluster_resources.get("GPU", 0.0))
    max_concurrent, resource_budget = allocate_resources(budget, cluster_resources, use_gpu, study.num_remaining)
    context = TrialContext(
        out_url=study.out_url,
        data_url=data_url,
        held_out_url=held_out_url,
        workers=budget.workers,
        device="gpu" if use_gpu else "cpu",
        resource_budget=resource_budget,
        minutes=budget.minutes,
        held_out_images=budget.held_out_images,
    )
    stop_requests = ray.remote(num_cpus=0)(StopRequests).remote()
    request_stop = stop_requests.stop.remote
    callback = StudyCallback(
        study, stop_event, stop_requests.stop_all.remote, lambda event, record: on_event(event, record, study)
    )
    try:
        # Not by a Tuner, which pickles all of this for a restore of its own.
        tune.run(
            tune.with_parameters(SweepTrainable, task=context, wishes=stop_requests),
            name=f"tune-{int(time.time() * 1000)}",
            num_samples=study.num_remaining,
            resources_per_trial=tune.PlacementGroupFactory([{"CPU": _TRIAL_CPUS}]),
            search_alg=StudySearcher(study, max_concurrent, stop_event),
            scheduler=build_scheduler(study, max_steps, request_stop),
            max_failures=budget.max_failures,
            callbacks=[callback],
            verbose=0,
            raise_on_failed_trial=False,
            **ray_storage_options(study.out_url),
        )
    finally:
        ray.kill(stop_requests)
        callback.settle()
        storage.remove_folder(storage.join(study.out_url, "ray"))


def allocate_resources(
    budget: BudgetConfig, cluster_resources: Mapping[str, float], use_gpu: bool, num_trials: int
) -> tuple[int, ResourceBudget]:
    """How many trials run at once, and what each of their workers takes.

    Args:
        total: resources of the cluster, with those that may still come.
        gpu: whether each worker takes a GPU.
        trials: how many are left.

    Raises:
        ValueError: there will never be room for so many.
    """
    resources = budget.resources or {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {})}
    num_fitting = _num_fitting_trials(resources, budget.workers, cluster_resources)
    if not budget.resources and num_fitting < (budget.max_concurrent_trials or 1):
        # Half CPUs, where whole ones would leave nothing for the tasks that read.
        half_cpu_resources = {**resources, "CPU": 0.5}
        if _num_fitting_trials(half_cpu_resources, budget.workers, cluster_resources) > num_fitting:
            resources, num_fitting = (
                half_cpu_resources,
                _num_fitting_trials(half_cpu_resources, budget.workers, cluster_resources),
            )
    num_concurrent = budget.max_concurrent_trials or max(1, num_fitting)
    if num_fitting < num_concurrent:
        worker_resources = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        raise ValueError(
            f"there is no room for {num_concurrent} trials at once, each of {budget.workers} workers with {worker_resources}, beside the "
            f"reading of data: the cluster has {cluster_resources.get('CPU', 0):g} CPU and {cluster_resources.get('GPU', 0):g} GPU; lower "
            "budget.concurrency, budget.workers or budget.resources"
        )
    return min(num_concurrent, num_trials), ResourceBudget(resources, concurrent_runs=min(num_concurrent, num_trials))


def _num_fitting_trials(resources: Mapping[str, float], workers: int, cluster_resources: Mapping[str, float]) -> int:
    """How many trials fit at once."""
    limits = []
    for name, amount in resources.items():
        if amount:
            reserved, trial_overhead = (_DATA_TASK_CPUS, _TRIAL_CPUS) if name == "CPU" else (0.0, 0.0)
            limits.append(
                int((cluster_resources.get(name, 0.0) - reserved) / (workers * amount + trial_overhead) + 1e-6)
            )
    return max(0, min(limits))
