"""What Tune is answered: whom the schedulers stop, and how the cluster is divided; without a cluster."""

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from small_sweeps import small_sweep

from bsq_ray.tuning.run_sweep import allocate_resources
from bsq_ray.tuning.study import Study
from bsq_ray.tuning.sweep_config import BudgetConfig
from bsq_ray.tuning.tune_adapters import build_scheduler

SCHEDULERS = {
    "asha": {"kind": "asha", "grace_steps": 10, "reduction": 2},
    "median": {"kind": "median", "grace_steps": 10, "trials_before": 2},
}


def make_reports(value, steps=(0, 10, 20, 30)):
    """(step, figures) of a trial that is better from evaluation to evaluation."""
    return [(step, {"psnr": value + step / 100}) for step in steps]


def replay_trial(scheduler, number, psnr, steps=(0, 10, 20, 30)):
    """Shows a trial's evaluations to the scheduler, which must let it continue whatever it decides."""
    trial = Trial("sweep", config={"number": number}, trial_id=f"trial{number}", stub=True)
    scheduler.on_trial_add(None, trial)
    for step, metrics in make_reports(psnr, steps):
        decision = scheduler.on_trial_result(None, trial, {"reached": step, "figures": metrics, **metrics})
        assert decision == TrialScheduler.CONTINUE
    # How it ended is no evaluation.
    scheduler.on_trial_result(None, trial, {"ending": "finished", "reason": "", "figures": {}})


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_worst_trial_requests_stop_once(tmp_path, kind):
    """The trial that does worst receives one stop request and is never killed."""
    stop_requests = []
    scheduler = build_scheduler(
        Study(small_sweep(tmp_path, scheduler=SCHEDULERS[kind]), str(tmp_path)), 1000, stop_requests.append
    )
    for number, psnr in enumerate((20.0, 21.0, 5.0, 22.0)):
        replay_trial(scheduler, number, psnr)
    assert stop_requests == [2]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_resumed_sweep_sees_previous_trials(tmp_path, kind):
    """The scheduler of a resumed sweep compares new trials with those that ended before."""
    sweep = small_sweep(tmp_path, scheduler=SCHEDULERS[kind], space={"model.quantizer.bits": {"values": [6, 7, 8, 9]}})
    study = Study(sweep, str(tmp_path / "out"))
    for psnr in (20.0, 21.0, 22.0):
        record = study.next()
        for step, metrics in make_reports(psnr):
            study.report(record, step, metrics)
        study.end(record, "finished", figures={"psnr": psnr})
    for folder, expected in (("out", [3]), ("empty", [])):
        stop_requests = []
        replay_trial(build_scheduler(Study(sweep, str(tmp_path / folder)), 1000, stop_requests.append), 3, 5.0)
        assert stop_requests == expected


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_resumed_trial_keeps_its_reports(tmp_path, kind):
    """Its first reports count for itself and for the others, though it does not make them again."""
    sweep = small_sweep(tmp_path, scheduler=SCHEDULERS[kind], space={"model.quantizer.bits": {"values": [6, 7, 8, 9]}})
    previous_study = Study(sweep, str(tmp_path / "out"))
    for psnr in (20.0, 21.0, 22.0):
        record = previous_study.next()
        for step, metrics in make_reports(psnr, (0, 10)):
            previous_study.report(record, step, metrics)
    study, stop_requests = Study(sweep, str(tmp_path / "out")), []
    scheduler = build_scheduler(study, 1000, stop_requests.append)
    for _ in range(3):
        number = study.next().number
        trial = Trial("sweep", config={"number": number}, trial_id=f"trial{number}", stub=True)
        scheduler.on_trial_add(None, trial)
    # It has come to step 10, like them.
    replay_trial(scheduler, 3, 5.0, (0, 10))
    assert stop_requests == [3]


def test_scheduler_own_metric_decides(tmp_path):
    """The scheduler can stop trials by another metric than the first metric of the sweep."""
    stop_requests = []
    scheduler_config = {**SCHEDULERS["asha"], "metric": "perceptual", "direction": "min"}
    scheduler = build_scheduler(
        Study(small_sweep(tmp_path, scheduler=scheduler_config), str(tmp_path)), 1000, stop_requests.append
    )
    for number, loss in enumerate((0.2, 0.9)):
        trial = Trial("sweep", config={"number": number}, trial_id=f"trial{number}", stub=True)
        scheduler.on_trial_add(None, trial)
        scheduler.on_trial_result(None, trial, {"reached": 10, "psnr": 20.0 + loss, "perceptual": loss})
    assert stop_requests == [1]


def test_build_scheduler_none_returns_fifo(tmp_path):
    """Without a scheduler no trial is stopped early."""
    assert type(build_scheduler(Study(small_sweep(tmp_path), str(tmp_path)), 1000, print)) is FIFOScheduler


@pytest.mark.parametrize(
    ("budget", "total", "gpu", "expected"),
    [
        # A CPU stays free for reading, and each trial has a small process of its own.
        ({}, {"CPU": 4}, False, (2, {"CPU": 1})),
        ({"workers": 2}, {"CPU": 4}, False, (1, {"CPU": 1})),
        # Halves where there is no room for whole ones.
        ({"concurrency": 2, "workers": 2}, {"CPU": 4}, False, (2, {"CPU": 0.5})),
        ({"workers": 4}, {"CPU": 64, "GPU": 8}, True, (2, {"CPU": 1, "GPU": 1})),
        ({"workers": 2, "resources": {"GPU": 0.5, "CPU": 2}}, {"CPU": 16, "GPU": 2}, True, (2, {"GPU": 0.5, "CPU": 2})),
    ],
)
def test_allocate_resources_divides_cluster(budget, cluster_resources, use_gpu, expected):
    """Each worker of a trial gets its part of the cluster, and one CPU stays free for data tasks."""
    num_concurrent, resource_budget = allocate_resources(BudgetConfig(**budget), cluster_resources, use_gpu, trials=20)
    assert (num_concurrent, resource_budget.resources_per_worker) == expected
    assert resource_budget.concurrent_runs == num_concurrent


def test_allocate_resources_limited_by_remaining_trials():
    """The number of concurrent trials never exceeds the number of remaining trials."""
    assert allocate_resources(BudgetConfig(), {"CPU": 64}, False, trials=3)[0] == 3


@pytest.mark.parametrize(
    ("budget", "total"),
    [({"concurrency": 3, "workers": 2}, {"CPU": 4}), ({"resources": {"TPU": 1}}, {"CPU": 64})],
)
def test_allocate_resources_too_large_raises(budget, cluster_resources):
    """Resources that the cluster can never provide raise an error that names the budget keys."""
    with pytest.raises(ValueError, match=r"there is no room for \d trials at once.*lower budget.concurrency"):
        allocate_resources(BudgetConfig(**budget), cluster_resources, gpu=False, trials=20)
