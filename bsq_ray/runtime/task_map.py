"""Unordered map over Ray tasks, for work that needs no model: each item is one task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from bsq_ray.runtime.ray_session import ray_session

Result = TypeVar("Result")


def task_map(
    function: Callable[..., Result],
    items: Iterable[tuple[Any, ...]],
    num_workers: int | None = None,
    address: str | None = None,
) -> Iterator[Result]:
    """Yield the result of each item as soon as it is available.

    Args:
        function: called with the elements of an item.
        items: arguments; taken one by one, so that they need not be in memory together.
        num_workers: number of concurrent tasks; 0 computes in this process, None uses all CPUs of the cluster.
        address: Ray cluster, see `ray_session`.

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
        task, function_ref, remaining = ray.remote(num_cpus=1)(_call), ray.put(function), iter(items)
        running = [task.remote(function_ref, *item) for item in islice(remaining, max_in_flight)]
        while running:
            [ready], running = ray.wait(running, num_returns=1)
            running += [task.remote(function_ref, *item) for item in islice(remaining, 1)]
            yield ray.get(ready)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)
