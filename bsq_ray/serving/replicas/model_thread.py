"""The single thread of a replica in which PyTorch computes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray.serve.metrics import Histogram
from torch import Tensor

from bsq_ray.serving.batching import DynamicBatcher
from bsq_ray.serving.service_config import Batching


class ModelThread:
    """Runs all computations of a model in one thread, so that its cores serve one computation at a time.

    Args:
        num_threads: threads of PyTorch; 0 is one per core.
    """

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, "model", lambda: set_num_threads(num_threads))

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a call in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def run_blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Block the calling thread until a call in the model thread returns, and return its result."""
        return self._executor.submit(function, *arguments).result()

    def make_batcher(self, function: Callable[[list[Any]], list[Any]], batching: Batching) -> DynamicBatcher:
        """Wrap a function of many items as an awaitable function of one item, computed in batches."""
        batch_size_histogram = Histogram(
            "serve_bsq_batch_size", "Requests computed in one batch.", [1, 2, 4, 8, 16, 32, 64], ("function",)
        )

        async def run_batch(items: list[Any]) -> list[Any]:
            batch_size_histogram.observe(len(items), {"function": function.__name__})
            results: list[Any] = await self(function, items)
            return results

        return DynamicBatcher(run_batch, batching.max_batch_size, batching.batch_wait_timeout_ms / 1000)


def set_num_threads(num_threads: int) -> None:
    """Set the threads of PyTorch in this process; 0 is one per core."""
    torch.set_num_threads(num_threads or os.cpu_count() or 1)


def num_cores(device: str) -> int:
    """Return the cores that can compute rows separately: all threads of PyTorch on a CPU, 1 on a GPU."""
    return torch.get_num_threads() if device == "cpu" else 1


def example_values(*shape: int) -> Tensor:
    """Return values in [-1, 1] that are the same on every node, for calibration."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
