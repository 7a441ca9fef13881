"""Collective operations on tensors that also run without a process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def num_workers() -> int:
    """Return the size of the process group, or 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_rank() -> int:
    """Return the rank in the process group, or 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def average_over_workers(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all workers, detached; collective. One worker gets its own values."""
    averaged = values.detach()
    if num_workers() > 1:
        averaged = averaged.clone()
        dist.all_reduce(averaged)
        averaged /= num_workers()
    return averaged
