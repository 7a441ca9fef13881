"""Unordered map over Ray tasks, for work that needs no state between items: each item is one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from bsq_ray.runtime.ray_session import gpus_per_process, ray_session

Result = TypeVar("Result")


def task_map(
    function: Callable[..., Result],
    items: Iterable[tuple[Any, ...]],
    num_workers: int | None = None,
    address: str | None = None,
    use_gpus: bool = False,
) -> Iterator[Result]:
    """Yield the result of each item as soon as it is available.

    Args:
        function: called with the elements of an item.
        items: arguments; taken one by one, so that they need not be in memory together.
        num_workers: number of concurrent tasks; 0 computes in this process, None uses all CPUs of the cluster.
        address: Ray cluster, see `ray_session`.
        use_gpus: each task has a GPU, or a fraction of one, if the cluster has GPUs.

    Raises:
        ValueError, RuntimeError: raised by the function for an item.
    """
    if num_workers == 0:
        for item in items:
            yield function(*item)
        return
    with ray_session(address):
        import ray

        max_in_flight = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        num_gpus = gpus_per_process(max_in_flight) if use_gpus else 0
        task = ray.remote(num_cpus=1, num_gpus=num_gpus)(_call)
        function_ref, remaining = ray.put(function), iter(items)
        running = [task.remote(function_ref, *item) for item in islice(remaining, max_in_flight)]
        while running:
            [ready], running = ray.wait(running, num_returns=1)
            running += [task.remote(function_ref, *item) for item in islice(remaining, 1)]
            yield ray.get(ready)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)
