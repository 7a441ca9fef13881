"""Work spread over a pool of actors by Ray Data, results in order: for models that are loaded once and used often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bsq_ray.runtime.ray_session import gpus_per_process, ray_session

Item = TypeVar("Item")
Result = TypeVar("Result")


def actor_map_ordered(
    items: Sequence[Item], build: Callable[[], Callable[[Item], Result]], num_workers: int, address: str | None = None
) -> Iterator[Result]:
    """Results of all items, in their order, as they come.

    Args:
        items: what to work on.
        build: called once in each actor; what it returns is called for each item.
        workers: actors, each with a CPU, and where the cluster has GPUs with one, or a part of one; 0 works in this
            process.
        address: Ray cluster, see `ray_session`.

    Raises:
        ValueError, RuntimeError: as raised by the work on an item.
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
                self.work: Any = None

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                result = np.empty(1, object)
                try:
                    self.work = self.work or self.build()
                    result[0] = self.work(self.items[int(rows["item"][0])])
                except (ValueError, RuntimeError) as error:
                    # Ray would wrap it in a page of its own words.
                    result[0] = _TaskError(error)
                return {"result": result}

        gpus_per_actor = gpus_per_process(num_workers)
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        indices = ray.data.from_items([{"item": n} for n in range(len(items))], override_num_blocks=len(items))
        pool = ActorPoolStrategy(size=min(num_workers, len(items)))
        for row in indices.map_batches(
            Actor, batch_size=1, compute=pool, num_cpus=1, num_gpus=gpus_per_actor
        ).iter_rows():
            if isinstance(row["result"], _TaskError):
                raise row["result"].error
            yield row["result"]


@dataclass(frozen=True)
class _TaskError:
    error: Exception
