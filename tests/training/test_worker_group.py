"""Outcomes of a worker group, with a coordinator in this process and without Ray."""

import threading
import time
from types import SimpleNamespace

import pytest
import ray
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from small_runs import small_spec

from bsq_ray.training import ray_trainer
from bsq_ray.training.ray_trainer import (
    Failed,
    Finished,
    Resized,
    StartupTimedOut,
    StoppedBeforeStart,
    WorkerConfig,
    WorkerGroupRun,
)
from bsq_ray.training.run_coordinator import RunCoordinator
from bsq_ray.training.run_spec import RunResult
from bsq_ray.training.worker_context import ControlSignal


class LocalHandle:
    """Calls the methods of an object directly, in place of an actor handle."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._target, name))


def result(finished):
    return RunResult(step=3, is_finished=finished, duration_s=1.0, images_per_second=1.0, data_wait_fraction=0.0)


def wait_for_signal(coordinator, signal):
    deadline = time.monotonic() + 60
    while coordinator.control_signal() is not signal and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def supervise(monkeypatch, tmp_path):
    """Function that supervises a group whose workers run `fit(coordinator)`, and returns the outcome and records."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray_trainer, "_POLL_INTERVAL_S", 0.02)

    def run(fit, *, has_capacity=False, draining=(), stop_event=None):
        monkeypatch.setattr(ray_trainer, "draining_nodes", lambda: set(draining))
        coordinator, records, closed = RunCoordinator(), [], []
        group = WorkerGroupRun(WorkerConfig(small_spec("shards", tmp_path), LocalHandle(coordinator), False, 1), 1, {})
        group.trainer = SimpleNamespace(fit=lambda: fit(coordinator))
        monitor = SimpleNamespace(poll=lambda: has_capacity, close=lambda: closed.append(True))
        outcome = group.supervise(monitor, records.append, stop_event or threading.Event())
        assert closed == [True]
        return outcome, records

    return run


def test_group_that_trains_to_its_end_is_finished(supervise):
    """The result of rank 0 is the outcome, and the other records are forwarded in order."""

    def fit(coordinator):
        coordinator.register(0, "node")
        coordinator.record({"kind": "training", "step": 3})
        coordinator.record({"kind": "result", "result": result(True)})

    assert supervise(fit) == (Finished(result(True)), [{"kind": "training", "step": 3}])


@pytest.mark.parametrize(
    ("cluster", "reason"),
    [
        ({"has_capacity": True}, "capacity for more workers is available; all steps are saved"),
        ({"draining": ["node"]}, "a node is draining; all steps are saved"),
    ],
)
def test_group_obeys_resize_signal(supervise, cluster, reason):
    """More capacity and a draining node make the workers save and exit."""

    def fit(coordinator):
        coordinator.register(0, "node")
        wait_for_signal(coordinator, ControlSignal.RESIZE)
        coordinator.record({"kind": "result", "result": result(False)})

    assert supervise(fit, **cluster)[0] == Resized(reason)


def test_group_lost_during_resize_is_failed(supervise):
    """A group that is lost before it has saved counts as failed, even if a resize was requested."""

    def fit(coordinator):
        coordinator.register(0, "node")
        wait_for_signal(coordinator, ControlSignal.RESIZE)
        raise RuntimeError("a worker died")

    outcome, _ = supervise(fit, has_capacity=True)
    assert outcome == Failed("a worker died", None, started=True)


def test_group_stop_request_finishes_it(supervise):
    """On a stop request the workers save and exit, and their unfinished result is the outcome."""
    stop_event = threading.Event()

    def fit(coordinator):
        coordinator.register(0, "node")
        stop_event.set()
        wait_for_signal(coordinator, ControlSignal.STOP)
        coordinator.record({"kind": "result", "result": result(False)})

    outcome, records = supervise(fit, stop_event=stop_event)
    assert outcome == Finished(result(False))
    assert [record["kind"] for record in records] == ["warning"]


def test_group_worker_error_is_its_failure(supervise):
    """The first error that a worker reports is the cause, not what Ray Train raises afterwards."""

    def fit(coordinator):
        coordinator.register(0, "node")
        coordinator.record({"kind": "training", "step": 5})
        coordinator.report_failure(ValueError("bits -1"), True)
        raise RuntimeError("worker group failed")

    outcome, _ = supervise(fit)
    assert isinstance(outcome, Failed)
    assert (outcome.cause, outcome.started) == ("bits -1", True)
    assert (outcome.failure.step, outcome.failure.is_fatal) == (5, True)


def test_group_without_capacity_timed_out(supervise):
    """Workers that cannot be placed are a timeout; another startup error is a failure."""

    def fail_with(error):
        def fit(coordinator):
            raise error

        return fit

    timeout = ControllerError(WorkerGroupStartupTimeoutError(1))
    assert supervise(fail_with(timeout))[0] == StartupTimedOut()
    other = ControllerError(OSError("OSError: the driver is missing"))
    assert supervise(fail_with(other))[0] == Failed("OSError: the driver is missing", None, started=False)


def test_group_stopped_before_start_does_not_wait(supervise):
    """A stop request ends the supervision of a group that has not started."""
    stop_event, placed = threading.Event(), threading.Event()
    stop_event.set()
    assert supervise(lambda coordinator: placed.wait(60), stop_event=stop_event)[0] == StoppedBeforeStart()
    placed.set()
