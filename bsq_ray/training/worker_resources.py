"""CPUs and GPUs of a run's workers, checked against what the cluster can ever provide."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from bsq_ray.runtime.ray_session import has_known_cluster_limits, max_cluster_cpus, max_cluster_gpus
from bsq_ray.training.capacity import DATA_TASK_RESOURCES, CapacityTimeouts, Resources
from bsq_ray.training.worker_context import Device, RecordSink

# Rounding of sums of fractional CPUs.
_CPU_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ResourceBudget:
    """Resources of a run on a shared cluster.

    Attributes:
        resources_per_worker: in Ray's names. None is one CPU, and one GPU if the workers compute on GPUs.
        concurrent_runs: number of runs that share each node's CPU threads.
        timeouts: how long an elastic run waits for capacity.
    """

    resources_per_worker: Resources | None = None
    concurrent_runs: int = 1
    timeouts: CapacityTimeouts = field(default_factory=CapacityTimeouts)


@dataclass(frozen=True)
class WorkerResources:
    """Resources of each worker of a run.

    Attributes:
        per_worker: in Ray's names.
        use_gpu: whether the workers compute on GPUs.
    """

    per_worker: Resources
    use_gpu: bool


def resolve_worker_resources(
    budget: ResourceBudget, device: Device, world_sizes: list[int], on_record: RecordSink
) -> WorkerResources:
    """Choose the resources of each worker on the connected cluster.

    Args:
        world_sizes: valid numbers of workers, ascending; the smallest must fit on the cluster.
        on_record: receives a warning if an autoscaler could start GPUs that are not requested.

    Raises:
        ValueError: the cluster can never provide enough GPUs or CPUs.
    """
    import ray

    min_workers, max_workers = world_sizes[0], world_sizes[-1]
    use_gpu = should_use_gpus(device, min_workers, available_gpus(device, on_record))
    # A whole CPU for each worker if data tasks still have one, else half a CPU.
    cpus_per_worker = 1.0 if ray.cluster_resources().get("CPU", 0) > max_workers else 0.5
    per_worker = budget.resources_per_worker or {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    check_cpus(min_workers, per_worker.get("CPU", 0.0), max_cluster_cpus())
    return WorkerResources(per_worker, use_gpu)


def available_gpus(device: Device, on_record: RecordSink) -> float:
    """Return the GPUs that the cluster can have; inf if its autoscaler's limits are unknown.

    With device "auto" and no running GPU it returns 0 and records a warning, because waiting for one may never end.
    """
    running_gpus = max_cluster_gpus()
    if has_known_cluster_limits() or device == "cpu":
        return running_gpus
    if device == "auto" and not running_gpus:
        text = "this cluster has no GPU yet, so training uses CPUs; pass --device gpu to wait for the autoscaler"
        on_record({"kind": "warning", "step": 0, "text": text})
        return 0.0
    return math.inf


def should_use_gpus(device: Device, min_workers: int, max_gpus: float) -> bool:
    """Return whether each worker computes on a GPU.

    Args:
        device: "auto" uses GPUs if the cluster has any or its autoscaler can start some.
        min_workers: smallest number of workers.
        max_gpus: GPUs that the cluster can have.

    Raises:
        ValueError: the cluster can never have a GPU for each worker.
    """
    if device == "cpu" or (device == "auto" and not max_gpus):
        return False
    if not max_gpus:
        raise ValueError("--device gpu requires a cluster with GPUs, and this one has none; give --device cpu")
    if max_gpus < min_workers:
        raise ValueError(
            f"{min_workers} workers need a GPU each, but the cluster has {max_gpus:g}; give --workers {max_gpus:g}, "
            "or --device cpu"
        )
    return True


def check_cpus(min_workers: int, cpus_per_worker: float, max_cpus: float) -> None:
    """Check that the workers and the data tasks can ever fit on the cluster.

    Args:
        min_workers: smallest number of workers.
        cpus_per_worker: CPUs of each.
        max_cpus: CPUs that the cluster can have.

    Raises:
        ValueError: the cluster can never have enough CPUs.
    """
    data_task_cpus = DATA_TASK_RESOURCES["CPU"]
    required_cpus = min_workers * cpus_per_worker + data_task_cpus
    if required_cpus <= max_cpus + _CPU_TOLERANCE:
        return
    max_workers = 0
    if cpus_per_worker:
        max_workers = max(0, int((max_cpus - data_task_cpus) / cpus_per_worker + _CPU_TOLERANCE))
    fix = f"--workers {max_workers} or fewer" if max_workers else "--workers 0, which trains without Ray"
    raise ValueError(
        f"{min_workers} workers of {cpus_per_worker:g} CPUs and the data tasks need {required_cpus:g} CPUs, but the "
        f"cluster has {max_cpus:g}; give {fix}"
    )
