"""Cluster capacity for workers: wait for it before a start, and monitor it to scale up a smaller group.

Capacity is queried with a pending placement group. It becomes ready when its bundles fit, and the autoscaler counts it
as demand. Each placement group includes one CPU for the data tasks.

    ScaleUpMonitor:   ┌────────┐ delay passed  ┌──────────┐ ready   ┌───────────┐
                      │ waiting│──────────────▶│ reserving│────────▶│ available │
                      └────────┘               └──────────┘         └───────────┘
                                   timeout: release, reserve the next size ↺
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Resources = dict[str, float]

# Reserved for data tasks, in addition to the workers.
DATA_TASK_RESOURCES: Resources = {"CPU": 1}
_POLL_INTERVAL_S = 0.5


@dataclass(frozen=True)
class CapacityTimeouts:
    """Timeouts of an elastic run, in seconds.

    Attributes:
        max_size_s: timeout for the maximum number of workers, before fewer workers are tried.
        smaller_size_s: timeout for each smaller number of workers.
        scale_up_delay_s: training time of a smaller group before more workers are requested.
        scale_up_s: timeout for each larger number of workers, before the next number is tried.
    """

    max_size_s: float = 10.0
    smaller_size_s: float = 3.0
    scale_up_delay_s: float = 60.0
    scale_up_s: float = 30.0


def wait_for_capacity(
    world_sizes: Sequence[int],
    resources_per_worker: Resources,
    should_stop: Callable[[], bool],
    timeouts: CapacityTimeouts = CapacityTimeouts(),
) -> int | None:
    """Wait until the cluster has capacity for a valid number of workers, trying the largest number first.

    Args:
        world_sizes: valid numbers of workers, ascending.
        resources_per_worker: resources per worker by Ray resource name.
        should_stop: polled while waiting; True ends the wait.
        timeouts: timeouts per number of workers.

    Returns:
        The number of workers, or None if `should_stop` ended the wait.
    """
    while True:
        for world_size in reversed(world_sizes):
            is_max = world_size == world_sizes[-1]
            deadline = time.monotonic() + (timeouts.max_size_s if is_max else timeouts.smaller_size_s)
            placement_group = _reserve(world_size, resources_per_worker)
            try:
                while time.monotonic() < deadline:
                    if should_stop():
                        return None
                    if placement_group.wait(_POLL_INTERVAL_S):
                        return world_size
            finally:
                _release(placement_group)


class ScaleUpMonitor:
    """Polls for capacity to scale up a worker group.

    Args:
        world_size: current number of workers of the group.
        world_sizes: valid numbers of workers, ascending.
        resources_per_worker: resources per worker by Ray resource name.
        timeouts: delay and timeouts of the requests.
    """

    def __init__(
        self,
        world_size: int,
        world_sizes: Sequence[int],
        resources_per_worker: Resources,
        timeouts: CapacityTimeouts = CapacityTimeouts(),
    ) -> None:
        self._extra_worker_counts = [larger - world_size for larger in world_sizes if larger > world_size]
        self._resources_per_worker = resources_per_worker
        self._timeouts = timeouts
        self._placement_group: Any = None
        self._deadline = time.monotonic() + timeouts.scale_up_delay_s

    def poll(self) -> bool:
        """Advance the state machine; if there is capacity, release the reservation and return True."""
        if not self._extra_worker_counts:
            return False
        if self._placement_group is not None and self._placement_group.wait(0):
            # Release the resources, because the larger group needs them.
            self.close()
            return True
        if time.monotonic() > self._deadline:
            self.close()
            # Largest number first, then the smaller ones, then the largest again.
            num_extra = self._extra_worker_counts.pop()
            self._extra_worker_counts.insert(0, num_extra)
            self._placement_group = _reserve(num_extra, self._resources_per_worker)
            self._deadline = time.monotonic() + self._timeouts.scale_up_s
        return False

    def close(self) -> None:
        """Release the pending reservation."""
        if self._placement_group is not None:
            _release(self._placement_group)
        self._placement_group = None


def _reserve(num_workers: int, resources_per_worker: Resources) -> Any:
    from ray.util.placement_group import placement_group

    return placement_group([resources_per_worker] * num_workers + [DATA_TASK_RESOURCES], strategy="PACK")


def _release(placement_group: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(placement_group)
