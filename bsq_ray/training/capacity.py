"""Room on the cluster for a number of workers: waited for, and watched while there could be more.

A placement group that waits is the question: it is ready when there is room, whatever else runs there, and it tells an
autoscaler what is wanted. Beside the workers a CPU is asked for, for the tasks that read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

Resources = dict[str, float]

# How long to wait for the most workers before fewer are taken, and for each fewer number.
_MAX_SIZE_TIMEOUT_S, _SMALLER_SIZE_TIMEOUT_S = 10.0, 3.0
# A smaller group has worked for so long before it is ended for a larger one; each larger number is waited for in turn.
_SCALE_UP_DELAY_S, _SCALE_UP_TIMEOUT_S = 60.0, 30.0
# For the tasks that read.
DATA_TASK_RESOURCES: Resources = {"CPU": 1}


def wait_for_capacity(
    world_sizes: Sequence[int], resources_per_worker: Resources, should_stop: Callable[[], bool]
) -> int | None:
    """The most workers for which there is room, as soon as there is room for any of the numbers.

    Args:
        sizes: possible numbers of workers, ascending.
        worker: what each of them needs.
        stopped: whether to give up, which returns None.
    """
    while True:
        for world_size in reversed(world_sizes):
            placement_group = _reserve([resources_per_worker] * world_size + [DATA_TASK_RESOURCES])
            try:
                deadline = time.monotonic() + (
                    _MAX_SIZE_TIMEOUT_S if world_size == world_sizes[-1] else _SMALLER_SIZE_TIMEOUT_S
                )
                while time.monotonic() < deadline:
                    if should_stop():
                        return None
                    if placement_group.wait(0.5):
                        return world_size
            finally:
                _release(placement_group)


class ScaleUpMonitor:
    """Watches for room for more workers than there are.

    Args:
        size: workers at work.
        sizes: possible numbers of workers, ascending.
        worker: what each of them needs.
    """

    def __init__(self, world_size: int, world_sizes: Sequence[int], resources_per_worker: Resources) -> None:
        self._extra_workers = [larger - world_size for larger in world_sizes if larger > world_size]
        self._resources_per_worker = resources_per_worker
        self._placement_group: Any = None
        self._deadline = time.monotonic() + _SCALE_UP_DELAY_S

    def capacity_available(self) -> bool:
        """Whether there is room now; to be asked again and again."""
        if not self._extra_workers:
            return False
        if self._placement_group is not None and self._placement_group.wait(0):
            # What it has taken is what the workers read with, or begin with.
            self.close()
            return True
        if time.monotonic() > self._deadline:
            self.close()
            num_extra = self._extra_workers.pop()
            self._extra_workers.insert(0, num_extra)
            self._placement_group = _reserve([self._resources_per_worker] * num_extra + [DATA_TASK_RESOURCES])
            self._deadline = time.monotonic() + _SCALE_UP_TIMEOUT_S
        return False

    def close(self) -> None:
        """Stops watching."""
        if self._placement_group is not None:
            _release(self._placement_group)
        self._placement_group = None


def draining_nodes() -> set[str]:
    """Machines whose end was announced: a spot machine that is reclaimed, or `ray drain-node`."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def _reserve(bundles: list[Resources]) -> Any:
    from ray.util.placement_group import placement_group

    return placement_group(bundles, strategy="PACK")


def _release(placement_group: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(placement_group)
