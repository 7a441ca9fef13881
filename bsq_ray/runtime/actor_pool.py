"""Ordered map over a pool of Ray actors, for models that are loaded once and applied to many items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bsq_ray.runtime.ray_session import gpus_per_process, ray_session

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _TaskError:
    """Error of an item, returned as its result: Ray Data would replace it by an error of its own."""

    error: Exception


# Ray Data's pool is used, not ray.util.ActorPool: that one assigns an item to a fixed actor, so an actor that cannot be
# placed, or whose node is lost, blocks every later result. Ray Data gives the items to the actors that are alive.
def actor_map_ordered(
    items: Sequence[Item], build: Callable[[], Callable[[Item], Result]], num_workers: int, address: str | None = None
) -> Iterator[Result]:
    """Yield the result of each item, in the order of the items, as soon as it is available.

    Args:
        items: inputs, one task each.
        build: called once per actor; returns the function that is applied to each item.
        num_workers: number of actors, each with a CPU and a GPU or part of one if the cluster has GPUs. 0 computes in
            this process.
        address: Ray cluster, see `ray_session`.

    Raises:
        Exception: raised by the function for an item.
    """
    if not items:
        return
    if num_workers == 0:
        yield from map(build(), items)
        return
    with ray_session(address):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        shared = ray.put((build, list(items)))

        class Actor:
            def __init__(self) -> None:
                self.build, self.items = ray.get(shared)
                self.function: Any = None

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                result = np.empty(1, object)
                try:
                    self.function = self.function or self.build()
                    result[0] = self.function(self.items[int(rows["item"][0])])
                except Exception as error:
                    result[0] = _TaskError(error)
                return {"result": result}

        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        indices = ray.data.from_items([{"item": n} for n in range(len(items))], override_num_blocks=len(items))
        results = indices.map_batches(
            Actor,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(num_workers, len(items))),
            num_cpus=1,
            num_gpus=gpus_per_process(num_workers),
        )
        for row in results.iter_rows():
            if isinstance(row["result"], _TaskError):
                raise row["result"].error
            yield row["result"]
