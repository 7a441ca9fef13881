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
class _ItemFailure:
    """Exception of an item, returned as its result: Ray Data would replace a raised one by its own exception."""

    error: Exception


# Not ray.util.ActorPool, which assigns each item to a fixed actor: an actor that cannot be placed, or whose node is
# lost, blocks all later results. Ray Data assigns items to the actors that are alive.
def actor_map_ordered(
    items: Sequence[Item], build: Callable[[], Callable[[Item], Result]], num_workers: int, address: str | None = None
) -> Iterator[Result]:
    """Yield the result of each item, in the order of the items, as soon as it is available.

    Args:
        items: inputs, one task each.
        build: called once per actor; loads the model and returns the function that is applied to each item.
        num_workers: maximum number of actors, each with a CPU and, if the cluster has GPUs, a GPU or a fraction of one.
            0 computes in this process, without Ray.
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

        inputs_ref = ray.put((build, list(items)))

        class Actor:
            def __init__(self) -> None:
                self.build, self.items = ray.get(inputs_ref)
                self.function: Any = None

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                result = np.empty(1, object)
                try:
                    self.function = self.function or self.build()
                    result[0] = self.function(self.items[int(rows["item"][0])])
                except Exception as error:
                    result[0] = _ItemFailure(error)
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
            if isinstance(row["result"], _ItemFailure):
                raise row["result"].error
            yield row["result"]
