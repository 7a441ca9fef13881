"""Training on Ray's workers: what they compute on, and what Prometheus hears of them."""

import math
import re
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from small_runs import PRESET, SMALL, small_spec

from bsq_ray import storage
from bsq_ray.config import load_config
from bsq_ray.runtime.ray_session import max_cluster_cpus
from bsq_ray.training import ray_trainer
from bsq_ray.training.launch import Interrupted, train
from bsq_ray.training.ray_trainer import ResourceBudget, check_cpus, picklable_error, should_use_gpus


@pytest.mark.parametrize(
    ("device", "within_reach", "expected"),
    [("auto", 0, False), ("auto", 2, True), ("auto", 16, True), ("cpu", 16, False), ("gpu", 2, True)],
)
def test_should_use_gpus_follows_device_and_cluster(device, within_reach, expected):
    """Workers use GPUs if the cluster has any or its autoscaler can start some."""
    assert should_use_gpus(device, 2, within_reach) is expected


@pytest.mark.parametrize(
    ("device", "within_reach", "message"),
    [
        ("auto", 1, "2 workers want a GPU each and the cluster has 1; give --workers 1, or --device cpu"),
        ("gpu", 0, "--device gpu needs a cluster with GPUs, and this one has none; give --device cpu"),
    ],
)
def test_should_use_gpus_too_few_raises(device, within_reach, message):
    """A cluster that can never have enough GPUs is rejected with a message that says what to do."""
    with pytest.raises(ValueError, match=message):
        should_use_gpus(device, 2, within_reach)


@pytest.mark.parametrize(
    ("workers", "each", "within_reach"),
    [(6, 0.5, 4), (3, 1, 4), (1, 3, 4), (1, 0.5, 2), (8, 1, math.inf), (4, 0, 1), (3, 0.1, 1.3)],
)
def test_check_cpus_with_data_task_cpu_passes(workers, each, within_reach):
    """Workers that leave one CPU for the data tasks are accepted."""
    check_cpus(workers, each, within_reach)


@pytest.mark.parametrize(
    ("workers", "each", "within_reach", "message"),
    [
        (7, 0.5, 4, "7 workers of 0.5 CPUs and .* want 4.5 CPUs and the cluster has 4; give --workers 6 or fewer"),
        (4, 1, 4, "4 workers of 1 CPUs and .* want 5 CPUs and the cluster has 4; give --workers 3 or fewer"),
        (1, 0.5, 1, "want 1.5 CPUs and the cluster has 1; give --workers 0, which needs no Ray"),
        (1, 0, 0, "want 1 CPUs and the cluster has 0; give --workers 0, which needs no Ray"),
    ],
)
def test_check_cpus_too_few_raises(workers, each, within_reach, message):
    """Workers that can never fit on the cluster are rejected with a message that says what to do."""
    with pytest.raises(ValueError, match=message):
        check_cpus(workers, each, within_reach)


@pytest.mark.parametrize("gpu", [False, True])
def test_worker_env_on_cpu_sets_malloc_tunables(gpu, tmp_path):
    """Only workers that compute on CPUs start with the glibc allocator settings."""
    job = small_spec("shards", tmp_path)
    group = ray_trainer.WorkerGroupRun(job, 1, {"CPU": 1}, {"job": job, "board": None, "gpu": gpu, "runs": 1})
    env_vars = group._trainer.run_config.worker_runtime_env.get("env_vars", {})
    assert ("GLIBC_TUNABLES" in env_vars) == (not gpu)


def test_train_elastic_min_workers_must_fit(photo_shards, tmp_path, ray_local):
    """The smallest number of workers of an elastic run must fit on the cluster."""
    for least, share, message in (
        (8, ResourceBudget(), "8 workers of 0.5 CPUs"),
        (2, ResourceBudget({"CPU": 2}), "2 workers of 2 CPUs"),
    ):
        with pytest.raises(ValueError, match=f"{message} .*; give --workers"):
            train(load_config(PRESET, SMALL), photo_shards, str(tmp_path), 16, min_workers=least, budget=share)


def test_max_cluster_cpus_includes_autoscaler(ray_local, monkeypatch):
    """CPUs that the autoscaler can start count, and are unlimited if its limits are unknown."""
    from ray._private import worker
    from ray._private.state import state

    assert max_cluster_cpus() == 4
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(head=False))
    assert max_cluster_cpus() == math.inf
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 96})
    assert max_cluster_cpus() == 96


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
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(test_on_ray\.py, line \d+\)", message)


@pytest.mark.parametrize(
    ("known", "device", "up", "expected", "warned"),
    [
        (True, "gpu", 0, 0, False),
        (False, "gpu", 0, math.inf, False),
        (False, "auto", 8, math.inf, False),
        (False, "auto", 0, 0, True),
        (False, "cpu", 0, 0, False),
    ],
)
def test_available_gpus_unknown_limits_are_unlimited(known, device, up, expected, warned, monkeypatch):
    """With unknown autoscaler limits GPUs count as unlimited, unless device is "auto" and none is running."""
    monkeypatch.setattr(ray_trainer, "gpus_within_reach", lambda: up)
    monkeypatch.setattr(ray_trainer, "reach_is_known", lambda: known)
    records = []
    assert ray_trainer.available_gpus(device, records.append) == expected
    assert ["--device gpu waits" in record["text"] for record in records] == [True] * warned


def test_max_cluster_gpus_includes_autoscaler(ray_local, monkeypatch):
    from ray._private.state import state

    from bsq_ray.runtime.ray_session import max_cluster_gpus

    assert max_cluster_gpus() == 0
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 96, "GPU": 8})
    assert max_cluster_gpus() == 8


def test_metrics_are_exported_to_prometheus(photo_shards, tmp_path, ray_local):
    """The training loss of a run is readable at the node's Prometheus endpoint."""
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    stop, values, records = threading.Event(), [], []

    def poll():
        deadline = time.monotonic() + 120
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

    def broken(settings):
        raise OSError("the driver is missing")

    monkeypatch.setattr(ray_trainer, "_worker_main", broken)
    records, message = [], r"^workers could not begin \(2 failures in a row\): .*the driver is missing"
    with pytest.raises(RuntimeError, match=message):
        train(
            load_config(PRESET, SMALL),
            *(photo_shards, str(tmp_path), 2),
            min_workers=1,
            max_failures=1,
            on_record=records.append,
        )
    [text] = [record["text"] for record in records if record["kind"] == "warning"]
    assert re.fullmatch(r"2 workers could not begin: .*the driver is missing.*; trying again", text, re.S)


def test_waiting_for_capacity_is_not_a_failure(photo_shards, tmp_path, ray_local, monkeypatch):
    """A worker group that cannot start for lack of capacity is retried and not counted as a failure."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    warnings, stop = [], threading.Event()

    def show(record):
        if record["kind"] == "warning":
            warnings.append(record["text"])
            if len(warnings) == 2:
                stop.set()

    with pytest.raises(Interrupted, match="stopped before the workers began"):
        train(
            load_config(PRESET, SMALL),
            *(photo_shards, str(tmp_path), 1),
            max_failures=0,
            on_record=show,
            stop_event=stop,
            budget=ResourceBudget({"CPU": 1, "a machine that is yet to come": 1}),
        )
    assert warnings == ["1 workers could not begin: no room; trying again"] * 2
