"""A sweep: many trainings with different configurations, each with its part of the cluster.

sweep.yaml ─▶ Study ─parameters─▶ Tune ─▶ SweepTrainable ─▶ Ray Train's workers
               ▲                              │
               └────────metrics, states───────┘      Study ─▶ results.parquet, README.md, best.yaml, plots
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from bsq_ray import storage
from bsq_ray.config.loader import load_config
from bsq_ray.data.factory import build_source
from bsq_ray.runtime.ray_session import max_cluster_resources, ray_session
from bsq_ray.runtime.signals import stop_on_signal
from bsq_ray.training.launch import Interrupted
from bsq_ray.training.ray_trainer import ray_storage_options
from bsq_ray.training.worker_context import Device
from bsq_ray.training.worker_resources import ResourceBudget, should_use_gpus
from bsq_ray.tuning.results import write_results
from bsq_ray.tuning.study import Study, TrialRecord
from bsq_ray.tuning.sweep_config import BudgetConfig, SweepConfig
from bsq_ray.tuning.sweep_folder import claim_folder

# CPUs of a trial's own process, in addition to its workers.
_TRIAL_CPUS = 0.1
# CPUs reserved for data tasks.
_DATA_TASK_CPUS = 1.0
# Rounding of sums of fractional resources.
_TOLERANCE = 1e-6
# Read by Ray and Tune at startup: no log files, no output, no handler of Ctrl-C, and no warning about the number of
# processes, because each trial has several.
_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started",
}

OnEvent = Callable[[str, TrialRecord, Study], None]


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep: its study and the record of the best trial."""

    study: Study
    best: TrialRecord


def run_sweep(
    sweep: SweepConfig,
    data_url: str,
    held_out_url: str,
    out_url: str,
    *,
    resume: bool = False,
    address: str | None = None,
    device: Device = "auto",
    stop_after_minutes: float | None = None,
    on_event: OnEvent = lambda event, record, study: None,
) -> SweepResult:
    """Run the remaining trials of a sweep and write the results into `out_url`.

    Args:
        data_url: packed training data.
        held_out_url: packed data for evaluation.
        resume: resume the sweep in `out_url`.
        address: Ray cluster, see `ray_session`.
        device: device of each worker.
        stop_after_minutes: save and stop after this time, as on Ctrl-C; None runs all trials.
        on_event: receives every event ("report", "end", "retry", "interrupted") with its trial.

    Raises:
        ValueError: sweep, data and folder do not fit together; nothing was started.
        Interrupted: the sweep was stopped and can be resumed.
        RuntimeError: no trial finished.
    """
    data_url, held_out_url, out_url = map(storage.absolute, (data_url, held_out_url, out_url))
    run_config = load_config(sweep.preset)
    for url in (data_url, held_out_url):
        if not build_source(run_config, url).num_samples:
            raise ValueError(f"{url} contains no samples")
    claim_folder(sweep, data_url, held_out_url, out_url, resume)
    study = Study(sweep, out_url)
    os.environ.update(_TUNE_ENV)
    with ray_session(address), stop_on_signal() as stop_event:
        if study.num_remaining:
            with _time_limit(stop_after_minutes, stop_event):
                _run_tune(
                    study,
                    data_url,
                    held_out_url,
                    device=device,
                    max_steps=sweep.budget.steps or run_config.training.steps,
                    stop_event=stop_event,
                    on_event=on_event,
                )
    write_results(study)
    if study.num_remaining or any(record.state == "running" for record in study.records):
        num_ended = sum(record.state != "running" for record in study.records)
        raise Interrupted(f"stopped after {num_ended} of {sweep.num_trials} trials; results so far are in {out_url}")
    best = study.best_trial()
    if best is None:
        reason = next((f"; trial {r.number}: {r.reason}" for r in study.records if r.reason), "")
        raise RuntimeError(f"no trial of {sweep.num_trials} finished{reason}")
    return SweepResult(study, best)


@contextmanager
def _time_limit(minutes: float | None, stop_event: threading.Event) -> Iterator[None]:
    """Set the event after so many minutes in the block; never if None."""
    if minutes is None:
        yield
        return
    timer = threading.Timer(60 * minutes, stop_event.set)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _run_tune(
    study: Study,
    data_url: str,
    held_out_url: str,
    *,
    device: Device,
    max_steps: int,
    stop_event: threading.Event,
    on_event: OnEvent,
) -> None:
    """Run the remaining trials of the study with Ray Tune."""
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
    callback = StudyCallback(
        study, stop_event, stop_requests.request_stop_all.remote, lambda event, record: on_event(event, record, study)
    )
    try:
        # Not with a Tuner: it pickles the trainable, searcher and callbacks, for a restore that is not used here.
        tune.run(
            tune.with_parameters(SweepTrainable, context=context, stop_requests=stop_requests),
            name=f"tune-{int(time.time() * 1000)}",
            num_samples=study.num_remaining,
            resources_per_trial=tune.PlacementGroupFactory([{"CPU": _TRIAL_CPUS}]),
            search_alg=StudySearcher(study, max_concurrent, stop_event),
            scheduler=build_scheduler(study, max_steps, stop_requests.request_stop.remote),
            max_failures=budget.max_failures,
            callbacks=[callback],
            verbose=0,
            raise_on_failed_trial=False,
            **ray_storage_options(study.out_url),
        )
    finally:
        ray.kill(stop_requests)
        callback.finalize()
        storage.remove_folder(storage.join(study.out_url, "ray"))


def allocate_resources(
    budget: BudgetConfig, cluster_resources: Mapping[str, float], use_gpu: bool, num_trials: int
) -> tuple[int, ResourceBudget]:
    """Choose the number of concurrent trials and the resources of each worker.

    Args:
        cluster_resources: resources of the cluster, with those that its autoscaler can add.
        use_gpu: whether each worker uses a GPU.
        num_trials: number of remaining trials.

    Raises:
        ValueError: the cluster can never run `budget.max_concurrent_trials` trials at once.
    """
    resources = budget.resources or {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {})}
    num_fitting = _num_fitting_trials(resources, budget.workers, cluster_resources)
    if not budget.resources and num_fitting < (budget.max_concurrent_trials or 1):
        # Half a CPU per worker, if whole ones would leave none for the data tasks.
        half_cpu_resources = {**resources, "CPU": 0.5}
        num_fitting_half = _num_fitting_trials(half_cpu_resources, budget.workers, cluster_resources)
        if num_fitting_half > num_fitting:
            resources, num_fitting = half_cpu_resources, num_fitting_half
    num_concurrent = budget.max_concurrent_trials or max(1, num_fitting)
    if num_fitting < num_concurrent:
        worker_resources = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        raise ValueError(
            f"the cluster cannot run {num_concurrent} trials at once, each of {budget.workers} workers with "
            f"{worker_resources}, and data tasks: it has {cluster_resources.get('CPU', 0):g} CPU and "
            f"{cluster_resources.get('GPU', 0):g} GPU; lower budget.max_concurrent_trials, budget.workers or "
            "budget.resources"
        )
    num_concurrent = min(num_concurrent, num_trials)
    return num_concurrent, ResourceBudget(resources, concurrent_runs=num_concurrent)


def _num_fitting_trials(resources: Mapping[str, float], workers: int, cluster_resources: Mapping[str, float]) -> int:
    """Return how many trials fit on the cluster at once."""
    limits = []
    for name, amount in resources.items():
        if amount:
            reserved, per_trial = (_DATA_TASK_CPUS, _TRIAL_CPUS) if name == "CPU" else (0.0, 0.0)
            available = cluster_resources.get(name, 0.0) - reserved
            limits.append(int(available / (workers * amount + per_trial) + _TOLERANCE))
    return max(0, min(limits))
