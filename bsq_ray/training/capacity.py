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
_PATIENCE, _FEWER_PATIENCE = 10.0, 3.0
# A smaller group has worked for so long before it is ended for a larger one; each larger number is waited for in turn.
_GROW_AFTER, _GROW_PATIENCE = 60.0, 30.0
# For the tasks that read.
READER: Resources = {"CPU": 1}


def wait_for_room(sizes: Sequence[int], worker: Resources, stopped: Callable[[], bool]) -> int | None:
    """The most workers for which there is room, as soon as there is room for any of the numbers.

    Args:
        sizes: possible numbers of workers, ascending.
        worker: what each of them needs.
        stopped: whether to give up, which returns None.
    """
    while True:
        for size in reversed(sizes):
            question = _ask([worker] * size + [READER])
            try:
                end = time.monotonic() + (_PATIENCE if size == sizes[-1] else _FEWER_PATIENCE)
                while time.monotonic() < end:
                    if stopped():
                        return None
                    if question.wait(0.5):
                        return size
            finally:
                _withdraw(question)


class Growth:
    """Watches for room for more workers than there are.

    Args:
        size: workers at work.
        sizes: possible numbers of workers, ascending.
        worker: what each of them needs.
    """

    def __init__(self, size: int, sizes: Sequence[int], worker: Resources) -> None:
        self._wanted = [larger - size for larger in sizes if larger > size]
        self._worker = worker
        self._question: Any = None
        self._until = time.monotonic() + _GROW_AFTER

    def possible(self) -> bool:
        """Whether there is room now; to be asked again and again."""
        if not self._wanted:
            return False
        if self._question is not None and self._question.wait(0):
            # What it has taken is what the workers read with, or begin with.
            self.end()
            return True
        if time.monotonic() > self._until:
            self.end()
            more = self._wanted.pop()
            self._wanted.insert(0, more)
            self._question = _ask([self._worker] * more + [READER])
            self._until = time.monotonic() + _GROW_PATIENCE
        return False

    def end(self) -> None:
        """Stops watching."""
        if self._question is not None:
            _withdraw(self._question)
        self._question = None


def nodes_to_be_taken() -> set[str]:
    """Machines whose end was announced: a spot machine that is reclaimed, or `ray drain-node`."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def _ask(bundles: list[Resources]) -> Any:
    from ray.util.placement_group import placement_group

    return placement_group(bundles, strategy="PACK")


def _withdraw(question: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(question)
