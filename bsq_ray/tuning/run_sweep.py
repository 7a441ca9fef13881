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
from bsq_ray.tuning.study import Record, Study
from bsq_ray.tuning.sweep_config import Budget, Sweep

# A trial's own process, beside its workers.
_TRIAL_CPUS = 0.1
# CPUs that stay free for the tasks that read data.
_READING_CPUS = 1.0
# What Ray and Tune read when they start: no log files and no words of their own, and Ctrl-C is not theirs. A trial has
# many small processes, which is no reason for a warning.
_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started",
}
# Keys of a sweep that may change when it goes on.
_CHANGEABLE = {"description", "budget"}
_LASTING_BUDGET = ("steps", "minutes")


@dataclass(frozen=True)
class Swept:
    """What came of it."""

    study: Study
    best: Record


def run_sweep(
    sweep: Sweep,
    data_url: str,
    held_out_url: str,
    out_url: str,
    resume: bool = False,
    address: str | None = None,
    device: Device = "auto",
    stop_after: float | None = None,
    show: Callable[[str, Record, Study], None] = lambda event, record, study: None,
) -> Swept:
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
    run = load_config(sweep.preset)
    for url in (data_url, held_out_url):
        if not build_source(run, url).num_samples:
            raise ValueError(f"{url} holds no samples")
    _claim(sweep, data_url, held_out_url, out_url, resume)
    study = Study(sweep, out_url)
    longest = sweep.budget.steps or run.training.steps
    os.environ.update(_QUIET)
    with ray_session(address), stop_on_signal() as stop:
        if study.left:
            timer = threading.Timer(60 * stop_after, stop.set) if stop_after is not None else None
            if timer:
                timer.daemon = True
                timer.start()
            _tune(study, data_url, held_out_url, device, longest, stop, show)
            if timer:
                timer.cancel()
    write_results(study)
    if study.left or any(record.state == "running" for record in study.records):
        ended = sum(record.state != "running" for record in study.records)
        raise Interrupted(f"stopped after {ended} of {sweep.trials} trials; results so far are in {out_url}")
    best = study.best()
    if best is None:
        reason = next((f"; trial {r.number}: {r.reason}" for r in study.records if r.reason), "")
        raise RuntimeError(f"no trial of {sweep.trials} finished{reason}")
    return Swept(study, best)


def _claim(sweep: Sweep, data_url: str, held_out_url: str, out_url: str, resume: bool) -> None:
    """Notes in the folder what its sweep is, and refuses another one."""
    url = storage.join(out_url, "sweep.yaml")
    now = {**sweep.model_dump(mode="json", exclude_none=True), "data": data_url, "held_out": held_out_url}
    if storage.exists(url):
        before = _noted(url)
        different = [key for key in sorted(before.keys() | now.keys()) if _lasting(before, key) != _lasting(now, key)]
        if different:
            raise ValueError(
                f"{out_url} holds another sweep ({', '.join(different)} differ); give the same values, or another --out"
            )
        if not resume:
            raise ValueError(f"{out_url} already holds this sweep; go on with it by --resume, or choose another --out")
    elif storage.list_folder(out_url):
        raise ValueError(f"{out_url} is not empty and holds no sweep; choose another --out")
    storage.write_bytes(url, yaml.safe_dump(now, sort_keys=False).encode())


def _noted(url: str) -> dict[str, Any]:
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


def _lasting(values: Mapping[str, Any], key: str) -> Any:
    """What must stay the same when a sweep goes on."""
    if key == "budget":
        return {name: values.get(key, {}).get(name) for name in _LASTING_BUDGET}
    if key == "metrics":
        # Their order matters: the first one says which trial is the best.
        return list(values.get(key, {}).items())
    return None if key in _CHANGEABLE else values.get(key)


def _tune(
    study: Study,
    data_url: str,
    held_out_url: str,
    device: Device,
    longest: int,
    stop: threading.Event,
    show: Callable[[str, Record, Study], None],
) -> None:
    """Runs what is left of the study with Ray Tune."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    import ray
    from ray import tune

    from bsq_ray.tuning.trial import Task, Trial, Wishes
    from bsq_ray.tuning.tune_adapters import StudySearcher, Watcher, build_scheduler

    budget = study.sweep.budget
    total = max_cluster_resources()
    if budget.resources:
        gpu = budget.resources.get("GPU", 0.0) > 0
    else:
        gpu = should_use_gpus(device, budget.workers, total.get("GPU", 0.0))
    concurrency, share = divide(budget, total, gpu, study.left)
    task = Task(
        out_url=study.out_url,
        data_url=data_url,
        held_out_url=held_out_url,
        workers=budget.workers,
        device="gpu" if gpu else "cpu",
        share=share,
        minutes=budget.minutes,
        held_out_images=budget.held_out_images,
    )
    wishes = ray.remote(num_cpus=0)(Wishes).remote()
    ask = wishes.stop.remote
    watcher = Watcher(study, stop, wishes.stop_all.remote, lambda event, record: show(event, record, study))
    try:
        # Not by a Tuner, which pickles all of this for a restore of its own.
        tune.run(
            tune.with_parameters(Trial, task=task, wishes=wishes),
            name=f"tune-{int(time.time() * 1000)}",
            num_samples=study.left,
            resources_per_trial=tune.PlacementGroupFactory([{"CPU": _TRIAL_CPUS}]),
            search_alg=StudySearcher(study, concurrency, stop),
            scheduler=build_scheduler(study, longest, ask),
            max_failures=budget.retries,
            callbacks=[watcher],
            verbose=0,
            raise_on_failed_trial=False,
            **ray_storage_options(study.out_url),
        )
    finally:
        ray.kill(wishes)
        watcher.settle()
        storage.remove_folder(storage.join(study.out_url, "ray"))


def divide(budget: Budget, total: Mapping[str, float], gpu: bool, trials: int) -> tuple[int, ResourceBudget]:
    """How many trials run at once, and what each of their workers takes.

    Args:
        total: resources of the cluster, with those that may still come.
        gpu: whether each worker takes a GPU.
        trials: how many are left.

    Raises:
        ValueError: there will never be room for so many.
    """
    resources = budget.resources or {"CPU": 1.0, **({"GPU": 1.0} if gpu else {})}
    room = _room(resources, budget.workers, total)
    if not budget.resources and room < (budget.concurrency or 1):
        # Half CPUs, where whole ones would leave nothing for the tasks that read.
        halved = {**resources, "CPU": 0.5}
        if _room(halved, budget.workers, total) > room:
            resources, room = halved, _room(halved, budget.workers, total)
    wanted = budget.concurrency or max(1, room)
    if room < wanted:
        each = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        raise ValueError(
            f"there is no room for {wanted} trials at once, each of {budget.workers} workers with {each}, beside the "
            f"reading of data: the cluster has {total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU; lower "
            "budget.concurrency, budget.workers or budget.resources"
        )
    return min(wanted, trials), ResourceBudget(resources, concurrent_runs=min(wanted, trials))


def _room(resources: Mapping[str, float], workers: int, total: Mapping[str, float]) -> int:
    """How many trials fit at once."""
    rooms = []
    for name, amount in resources.items():
        if amount:
            reserved, own = (_READING_CPUS, _TRIAL_CPUS) if name == "CPU" else (0.0, 0.0)
            rooms.append(int((total.get(name, 0.0) - reserved) / (workers * amount + own) + 1e-6))
    return max(0, min(rooms))
