"""Training on Ray workers: environment, retries, elastic sizes and exported metrics."""

import re
import threading
import time
import urllib.request

import pytest
from small_runs import PRESET, SMALL, small_spec

from bsq_ray import storage
from bsq_ray.config import load_config
from bsq_ray.training import ray_trainer
from bsq_ray.training.launch import Interrupted, train
from bsq_ray.training.ray_trainer import Failed, WorkerConfig, WorkerGroupRun, picklable_error
from bsq_ray.training.run_coordinator import Failure, RunCoordinator
from bsq_ray.training.worker_context import ControlSignal
from bsq_ray.training.worker_resources import ResourceBudget


@pytest.mark.parametrize("use_gpu", [False, True])
def test_worker_env_on_cpu_sets_malloc_tunables(use_gpu, tmp_path):
    """Only workers that compute on CPUs start with the glibc allocator settings."""
    spec = small_spec("shards", tmp_path)
    group = WorkerGroupRun(WorkerConfig(spec, None, use_gpu, concurrent_runs=1), 1, {"CPU": 1})
    env_vars = group.trainer.run_config.worker_runtime_env.get("env_vars", {})
    assert ("GLIBC_TUNABLES" in env_vars) == (not use_gpu)


def test_train_elastic_min_workers_must_fit(photo_shards, tmp_path, ray_local):
    """The smallest number of workers of an elastic run must fit on the cluster."""
    run_config = load_config(PRESET, [*SMALL, "training.batch_size=64"])
    for min_workers, budget, message in (
        (8, ResourceBudget(), "8 workers of 0.5 CPUs"),
        (2, ResourceBudget({"CPU": 2}), "2 workers of 2 CPUs"),
    ):
        with pytest.raises(ValueError, match=f"{message} .*; give --workers"):
            train(run_config, photo_shards, str(tmp_path), 16, min_workers=min_workers, budget=budget)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("bits -1"), ValueError, "bits -1"),
        (storage.StorageUnavailableError("cannot read s3://a: 503"), RuntimeError, "cannot read s3://a: 503"),
        (RuntimeError("too many"), RuntimeError, "too many"),
        (KeyError("a"), RuntimeError, "KeyError: 'a'"),
    ],
)
def test_picklable_error_keeps_only_input_errors(error, kind, message):
    """Only input errors stay ValueErrors; storage and internal errors become RuntimeErrors."""
    converted = picklable_error(error)
    assert (type(converted), str(converted)) == (kind, message)


def test_picklable_error_unexpected_names_file_and_line():
    """The message of an unexpected error names the file and line where it was raised."""
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / len([])
    message = str(picklable_error(caught.value))
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(test_ray_trainer\.py, line \d+\)", message)


def test_failure_tracker_checkpoint_resets_count():
    """A checkpoint resets the number of failures in a row; without one the limit ends the run."""
    tracker = ray_trainer._FailureTracker(max_failures=1)
    record = tracker.tracking(lambda record: None)
    for step in (3, 6, 9):
        tracker.record_or_raise(Failed("lost", None, started=True))
        record({"kind": "checkpoint", "step": step})
    tracker.record_or_raise(Failed("lost", None, started=True))
    with pytest.raises(RuntimeError, match="^lost$"):
        tracker.record_or_raise(Failed("lost", None, started=True))
    assert tracker.step == 9


@pytest.mark.parametrize(("steps", "is_fatal"), [([5, 5], False), ([5], True)])
def test_failure_tracker_pointless_retry_raises(steps, is_fatal):
    """A fatal error, and one that repeats itself at the same step, ends the run with the workers' error."""
    tracker = ray_trainer._FailureTracker(max_failures=10)
    *earlier, last = [Failed("bits -1", Failure(ValueError("bits -1"), step, is_fatal), True) for step in steps]
    for outcome in earlier:
        tracker.record_or_raise(outcome)
    with pytest.raises(ValueError, match="bits -1"):
        tracker.record_or_raise(last)


def test_coordinator_new_group_keeps_stop_only():
    """A resize request concerns one worker group, a stop request all; the first error of a group counts."""
    coordinator = RunCoordinator()
    coordinator.request(ControlSignal.RESIZE)
    coordinator.register(0, "node")
    coordinator.record({"kind": "training", "step": 7})
    coordinator.report_failure(ValueError("first"), False)
    coordinator.report_failure(ValueError("second"), False)
    events = coordinator.drain()
    assert (events.node_ids, str(events.failure.error), events.failure.step) == ({0: "node"}, "first", 7)
    assert coordinator.drain().records == []
    coordinator.reset_for_group()
    assert coordinator.control_signal() is ControlSignal.CONTINUE
    assert coordinator.drain().failure is None
    coordinator.request(ControlSignal.STOP)
    coordinator.request(ControlSignal.RESIZE)
    coordinator.reset_for_group()
    assert coordinator.control_signal() is ControlSignal.STOP


def test_metrics_are_exported_to_prometheus(photo_shards, tmp_path, ray_local):
    """The training loss of a run is readable at the node's Prometheus endpoint."""
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    stop, values, records = threading.Event(), [], []

    def poll():
        deadline = time.monotonic() + 400
        while not values and time.monotonic() < deadline:
            time.sleep(0.5)
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            values.extend(re.findall(rf'^ray_bsq_training_loss{{.*run="{tmp_path}".*}} (\S+)$', text, re.M))
        stop.set()

    threading.Thread(target=poll).start()
    with pytest.raises(Interrupted):
        train(
            load_config(PRESET, [*SMALL, "training.steps=1000000", "training.checkpoint_every=1000000"]),
            *(photo_shards, str(tmp_path), 1),
            on_record=records.append,
            stop_event=stop,
        )
    losses = [record["loss"] for record in records if record["kind"] == "training"]
    assert float(values[0]) in [pytest.approx(loss) for loss in losses]


def test_repeated_startup_failure_ends_elastic_run(photo_shards, tmp_path, ray_local, monkeypatch):
    """An elastic run ends with an error when its workers repeatedly fail to start."""

    def broken(worker_config):
        raise OSError("the driver is missing")

    monkeypatch.setattr(ray_trainer, "_worker_main", broken)
    records, message = [], r"^workers could not start \(2 failures in a row\): .*the driver is missing"
    with pytest.raises(RuntimeError, match=message):
        train(
            load_config(PRESET, SMALL),
            *(photo_shards, str(tmp_path), 2),
            min_workers=1,
            max_failures=1,
            on_record=records.append,
        )
    [text] = [record["text"] for record in records if record["kind"] == "warning"]
    assert re.fullmatch(r"could not start 2 workers: .*the driver is missing.*; retrying", text, re.S)


def test_waiting_for_capacity_is_not_a_failure(photo_shards, tmp_path, ray_local, monkeypatch):
    """A worker group that cannot start for lack of capacity is retried and not counted as a failure."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    warnings, stop = [], threading.Event()

    def stop_at_second_warning(record):
        if record["kind"] == "warning":
            warnings.append(record["text"])
            if len(warnings) == 2:
                stop.set()

    with pytest.raises(Interrupted, match="stopped before the workers started"):
        train(
            load_config(PRESET, SMALL),
            *(photo_shards, str(tmp_path), 1),
            max_failures=0,
            on_record=stop_at_second_warning,
            stop_event=stop,
            budget=ResourceBudget({"CPU": 1, "a node that is still to be added": 1}),
        )
    assert warnings == ["could not start 1 workers: insufficient cluster capacity; retrying"] * 2
