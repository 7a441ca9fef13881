"""What Tune is answered: whom the schedulers stop, and how the cluster is divided; without a cluster."""

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from small_sweeps import small_sweep

from bsq_ray.tuning.run_sweep import divide
from bsq_ray.tuning.study import Study
from bsq_ray.tuning.sweep_config import Budget
from bsq_ray.tuning.tune_adapters import build_scheduler

SCHEDULERS = {
    "asha": {"kind": "asha", "grace_steps": 10, "reduction": 2},
    "median": {"kind": "median", "grace_steps": 10, "trials_before": 2},
}


def reports(value, steps=(0, 10, 20, 30)):
    """(step, figures) of a trial that is better from evaluation to evaluation."""
    return [(step, {"psnr": value + step / 100}) for step in steps]


def tried(scheduler, number, value, steps=(0, 10, 20, 30)):
    """Shows a trial's evaluations to the scheduler, which must let it continue whatever it decides."""
    trial = Trial("sweep", config={"number": number}, trial_id=f"trial{number}", stub=True)
    scheduler.on_trial_add(None, trial)
    for step, figures in reports(value, steps):
        decision = scheduler.on_trial_result(None, trial, {"reached": step, "figures": figures, **figures})
        assert decision == TrialScheduler.CONTINUE
    # How it ended is no evaluation.
    scheduler.on_trial_result(None, trial, {"ending": "finished", "reason": "", "figures": {}})


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_worse_trials_are_asked_to_stop_once_and_never_killed(tmp_path, kind):
    asked = []
    scheduler = build_scheduler(
        Study(small_sweep(tmp_path, scheduler=SCHEDULERS[kind]), str(tmp_path)), 1000, asked.append
    )
    for number, psnr in enumerate((20.0, 21.0, 5.0, 22.0)):
        tried(scheduler, number, psnr)
    assert asked == [2]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_sweep_that_goes_on_compares_with_the_trials_before(tmp_path, kind):
    sweep = small_sweep(tmp_path, scheduler=SCHEDULERS[kind], space={"model.quantizer.bits": {"values": [6, 7, 8, 9]}})
    study = Study(sweep, str(tmp_path / "out"))
    for psnr in (20.0, 21.0, 22.0):
        record = study.next()
        for step, figures in reports(psnr):
            study.report(record, step, figures)
        study.end(record, "finished", figures={"psnr": psnr})
    for folder, expected in (("out", [3]), ("empty", [])):
        asked = []
        tried(build_scheduler(Study(sweep, str(tmp_path / folder)), 1000, asked.append), 3, 5.0)
        assert asked == expected


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_trial_that_goes_on_is_compared_by_what_it_reported_before(tmp_path, kind):
    """Its first reports count for itself and for the others, though it does not make them again."""
    sweep = small_sweep(tmp_path, scheduler=SCHEDULERS[kind], space={"model.quantizer.bits": {"values": [6, 7, 8, 9]}})
    before = Study(sweep, str(tmp_path / "out"))
    for psnr in (20.0, 21.0, 22.0):
        record = before.next()
        for step, figures in reports(psnr, (0, 10)):
            before.report(record, step, figures)
    study, asked = Study(sweep, str(tmp_path / "out")), []
    scheduler = build_scheduler(study, 1000, asked.append)
    for _ in range(3):
        number = study.next().number
        trial = Trial("sweep", config={"number": number}, trial_id=f"trial{number}", stub=True)
        scheduler.on_trial_add(None, trial)
    # It has come to step 10, like them.
    tried(scheduler, 3, 5.0, (0, 10))
    assert asked == [3]


def test_the_scheduler_can_follow_a_metric_of_its_own(tmp_path):
    asked = []
    follows = {**SCHEDULERS["asha"], "metric": "perceptual", "direction": "min"}
    scheduler = build_scheduler(Study(small_sweep(tmp_path, scheduler=follows), str(tmp_path)), 1000, asked.append)
    for number, loss in enumerate((0.2, 0.9)):
        trial = Trial("sweep", config={"number": number}, trial_id=f"trial{number}", stub=True)
        scheduler.on_trial_add(None, trial)
        scheduler.on_trial_result(None, trial, {"reached": 10, "psnr": 20.0 + loss, "perceptual": loss})
    assert asked == [1]


def test_without_a_scheduler_nobody_is_stopped(tmp_path):
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
def test_a_trial_gets_its_share_of_the_cluster(budget, total, gpu, expected):
    concurrency, share = divide(Budget(**budget), total, gpu, trials=20)
    assert (concurrency, share.resources_per_worker) == expected
    assert share.concurrent_runs == concurrency


def test_more_trials_than_are_left_get_no_share():
    assert divide(Budget(), {"CPU": 64}, False, trials=3)[0] == 3


@pytest.mark.parametrize(
    ("budget", "total"),
    [({"concurrency": 3, "workers": 2}, {"CPU": 4}), ({"resources": {"TPU": 1}}, {"CPU": 64})],
)
def test_what_the_cluster_can_never_hold_is_refused(budget, total):
    with pytest.raises(ValueError, match=r"there is no room for \d trials at once.*lower budget.concurrency"):
        divide(Budget(**budget), total, gpu=False, trials=20)
