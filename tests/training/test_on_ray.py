"""Training on Ray's workers: what they compute on, and what Prometheus hears of them."""

import math
import re
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
from small_runs import PRESET, SMALL, small_job

from bsq_ray import storage
from bsq_ray.config import load_config
from bsq_ray.runtime.ray_session import cpus_within_reach
from bsq_ray.training import ray_trainer
from bsq_ray.training.launch import Interrupted, train
from bsq_ray.training.ray_trainer import Share, check_cpus, plain_error, train_on_gpus


@pytest.mark.parametrize(
    ("device", "within_reach", "expected"),
    [("auto", 0, False), ("auto", 2, True), ("auto", 16, True), ("cpu", 16, False), ("gpu", 2, True)],
)
def test_workers_take_gpus_where_there_are_or_will_be_any(device, within_reach, expected):
    assert train_on_gpus(device, 2, within_reach) is expected


@pytest.mark.parametrize(
    ("device", "within_reach", "message"),
    [
        ("auto", 1, "2 workers want a GPU each and the cluster has 1; give --workers 1, or --device cpu"),
        ("gpu", 0, "--device gpu needs a cluster with GPUs, and this one has none; give --device cpu"),
    ],
)
def test_a_cluster_that_will_never_have_enough_gpus_is_refused(device, within_reach, message):
    with pytest.raises(ValueError, match=message):
        train_on_gpus(device, 2, within_reach)


@pytest.mark.parametrize(
    ("workers", "each", "within_reach"),
    [(6, 0.5, 4), (3, 1, 4), (1, 3, 4), (1, 0.5, 2), (8, 1, math.inf), (4, 0, 1), (3, 0.1, 1.3)],
)
def test_workers_that_leave_a_cpu_for_the_tasks_that_read_are_admitted(workers, each, within_reach):
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
def test_workers_that_a_cluster_can_never_hold_are_refused(workers, each, within_reach, message):
    with pytest.raises(ValueError, match=message):
        check_cpus(workers, each, within_reach)


@pytest.mark.parametrize("gpu", [False, True])
def test_workers_on_cpus_are_started_so_that_they_keep_their_memory(gpu, tmp_path):
    job = small_job("shards", tmp_path)
    group = ray_trainer._Group(job, 1, {"CPU": 1}, {"job": job, "board": None, "gpu": gpu, "runs": 1})
    told = group._trainer.run_config.worker_runtime_env.get("env_vars", {})
    assert ("GLIBC_TUNABLES" in told) == (not gpu)


def test_of_a_range_of_workers_the_fewest_must_find_room(photo_shards, tmp_path, ray_local):
    for least, share, asked in ((8, Share(), "8 workers of 0.5 CPUs"), (2, Share({"CPU": 2}), "2 workers of 2 CPUs")):
        with pytest.raises(ValueError, match=f"{asked} .*; give --workers"):
            train(load_config(PRESET, SMALL), photo_shards, str(tmp_path), 16, min_workers=least, share=share)


def test_cpus_that_an_autoscaler_could_bring_up_count_and_may_be_unknown(ray_local, monkeypatch):
    from ray._private import worker
    from ray._private.state import state

    assert cpus_within_reach() == 4
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(head=False))
    assert cpus_within_reach() == math.inf
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 96})
    assert cpus_within_reach() == 96


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("bits -1"), ValueError, "bits -1"),
        (storage.StorageUnavailableError("cannot read s3://a: 503"), RuntimeError, "cannot read s3://a: 503"),
        (RuntimeError("too many"), RuntimeError, "too many"),
        (KeyError("a"), RuntimeError, "KeyError: 'a'"),
    ],
)
def test_only_what_is_wrong_with_the_input_is_told_as_such(error, kind, message):
    told = plain_error(error)
    assert (type(told), str(told)) == (kind, message)


def test_what_nobody_foresaw_names_its_place():
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / len([])
    told = str(plain_error(caught.value))
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(test_on_ray\.py, line \d+\)", told)


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
def test_what_an_autoscaler_that_tells_nothing_may_bring_up_is_waited_for(
    known, device, up, expected, warned, monkeypatch
):
    monkeypatch.setattr(ray_trainer, "gpus_within_reach", lambda: up)
    monkeypatch.setattr(ray_trainer, "reach_is_known", lambda: known)
    told = []
    assert ray_trainer.gpus_in_sight(device, told.append) == expected
    assert ["--device gpu waits" in record["text"] for record in told] == [True] * warned


def test_gpus_that_an_autoscaler_could_bring_up_count(ray_local, monkeypatch):
    from ray._private.state import state

    from bsq_ray.runtime.ray_session import gpus_within_reach

    assert gpus_within_reach() == 0
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 96, "GPU": 8})
    assert gpus_within_reach() == 8


def test_figures_of_a_run_are_at_the_endpoint_that_prometheus_asks(photo_shards, tmp_path, ray_local):
    import ray

    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    stop, found, records = threading.Event(), [], []

    def ask():
        deadline = time.monotonic() + 120
        while not found and time.monotonic() < deadline:
            time.sleep(0.5)
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            found.extend(re.findall(rf'^ray_bsq_training_loss{{.*run="{tmp_path}".*}} (\S+)$', text, re.M))
        stop.set()

    threading.Thread(target=ask).start()
    with pytest.raises(Interrupted):
        train(
            load_config(PRESET, [*SMALL, "training.steps=1000000", "training.checkpoint_every=1000000"]),
            *(photo_shards, str(tmp_path), 1),
            show=records.append,
            stop=stop,
        )
    losses = [record["loss"] for record in records if record["kind"] == "training"]
    assert float(found[0]) in [pytest.approx(loss) for loss in losses]


def test_a_start_that_fails_again_and_again_ends_an_elastic_run(photo_shards, tmp_path, ray_local, monkeypatch):
    def broken(settings):
        raise OSError("the driver is missing")

    monkeypatch.setattr(ray_trainer, "_worker_main", broken)
    records, told = [], r"^workers could not begin \(2 failures in a row\): .*the driver is missing"
    with pytest.raises(RuntimeError, match=told):
        train(
            load_config(PRESET, SMALL),
            *(photo_shards, str(tmp_path), 2),
            min_workers=1,
            max_failures=1,
            show=records.append,
        )
    [text] = [record["text"] for record in records if record["kind"] == "warning"]
    assert re.fullmatch(r"2 workers could not begin: .*the driver is missing.*; trying again", text, re.S)


def test_waiting_for_room_is_no_failure(photo_shards, tmp_path, ray_local, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    waited, stop = [], threading.Event()

    def show(record):
        if record["kind"] == "warning":
            waited.append(record["text"])
            if len(waited) == 2:
                stop.set()

    with pytest.raises(Interrupted, match="stopped before the workers began"):
        train(
            load_config(PRESET, SMALL),
            *(photo_shards, str(tmp_path), 1),
            max_failures=0,
            show=show,
            stop=stop,
            share=Share({"CPU": 1, "a machine that is yet to come": 1}),
        )
    assert waited == ["1 workers could not begin: no room; trying again"] * 2
