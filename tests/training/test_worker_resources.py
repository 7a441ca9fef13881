"""Resources of Ray workers: device choice, and errors for clusters that are too small."""

import math

import pytest

from bsq_ray.training import worker_resources
from bsq_ray.training.worker_resources import check_cpus, should_use_gpus


@pytest.mark.parametrize(
    ("device", "max_gpus", "expected"),
    [("auto", 0, False), ("auto", 2, True), ("auto", 16, True), ("cpu", 16, False), ("gpu", 2, True)],
)
def test_should_use_gpus_follows_device_and_cluster(device, max_gpus, expected):
    """Workers use GPUs if the cluster has any or its autoscaler can start some."""
    assert should_use_gpus(device, 2, max_gpus) is expected


@pytest.mark.parametrize(
    ("device", "max_gpus", "message"),
    [
        ("auto", 1, "2 workers need a GPU each, but the cluster has 1; give --workers 1, or --device cpu"),
        ("gpu", 0, "--device gpu requires a cluster with GPUs, and this one has none; give --device cpu"),
    ],
)
def test_should_use_gpus_too_few_raises(device, max_gpus, message):
    """A cluster that can never have enough GPUs is rejected with a message that states what to do."""
    with pytest.raises(ValueError, match=message):
        should_use_gpus(device, 2, max_gpus)


@pytest.mark.parametrize(
    ("num_workers", "cpus_per_worker", "max_cpus"),
    [(6, 0.5, 4), (3, 1, 4), (1, 3, 4), (1, 0.5, 2), (8, 1, math.inf), (4, 0, 1), (3, 0.1, 1.3)],
)
def test_check_cpus_with_data_task_cpu_passes(num_workers, cpus_per_worker, max_cpus):
    """Workers that leave one CPU for the data tasks are accepted."""
    check_cpus(num_workers, cpus_per_worker, max_cpus)


@pytest.mark.parametrize(
    ("num_workers", "cpus_per_worker", "max_cpus", "message"),
    [
        (7, 0.5, 4, "7 workers of 0.5 CPUs and .* need 4.5 CPUs, but the cluster has 4; give --workers 6 or fewer"),
        (4, 1, 4, "4 workers of 1 CPUs and .* need 5 CPUs, but the cluster has 4; give --workers 3 or fewer"),
        (1, 0.5, 1, "need 1.5 CPUs, but the cluster has 1; give --workers 0, which trains without Ray"),
        (1, 0, 0, "need 1 CPUs, but the cluster has 0; give --workers 0, which trains without Ray"),
    ],
)
def test_check_cpus_too_few_raises(num_workers, cpus_per_worker, max_cpus, message):
    """Workers that can never fit on the cluster are rejected with a message that states what to do."""
    with pytest.raises(ValueError, match=message):
        check_cpus(num_workers, cpus_per_worker, max_cpus)


@pytest.mark.parametrize(
    ("known", "device", "running", "expected", "warned"),
    [
        (True, "gpu", 0, 0, False),
        (False, "gpu", 0, math.inf, False),
        (False, "auto", 8, math.inf, False),
        (False, "auto", 0, 0, True),
        (False, "cpu", 0, 0, False),
    ],
)
def test_available_gpus_unknown_limits_are_unlimited(known, device, running, expected, warned, monkeypatch):
    """With unknown autoscaler limits GPUs count as unlimited, unless device is "auto" and none is running."""
    monkeypatch.setattr(worker_resources, "max_cluster_gpus", lambda: running)
    monkeypatch.setattr(worker_resources, "has_known_cluster_limits", lambda: known)
    records = []
    assert worker_resources.available_gpus(device, records.append) == expected
    assert ["pass --device gpu to wait" in record["text"] for record in records] == [True] * warned
