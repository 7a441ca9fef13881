"""Data parallelism without sharding: gradients are averaged in buckets during the backward pass."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray.runtime._torch_internals import skip_steps_if_set
from bsq_ray.training.checkpoints.host_snapshot import FileWriters, torch_save_writer
from bsq_ray.training.engines.engine import Engine, gradient_norm
from bsq_ray.training.engines.gradient_buckets import GradientBuckets


class DataParallelEngine(Engine):
    """Replicates the module and the optimizer state on every worker.

    Args:
        optimizers: by name of their state in a checkpoint; each parameter belongs to one of them.
        communication_dtype: data type in which workers send their gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: dict[str, torch.optim.Optimizer],
        max_grad_norm: float,
        accumulation_steps: int,
        found_nonfinite: Tensor,
        communication_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.found_nonfinite = found_nonfinite
        for optimizer in optimizers.values():
            skip_steps_if_set(optimizer, found_nonfinite)
        self.module = module
        self.optimizers = optimizers
        self.max_grad_norm = max_grad_norm
        self.accumulation_steps = accumulation_steps
        self._num_micro_batches = 0
        self._buckets = GradientBuckets(module.parameters(), communication_dtype)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, 0)

    def __call__(self, *inputs: Tensor | tuple[Tensor, ...] | None) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        if (self._num_micro_batches + 1) % self.accumulation_steps == 0:
            self._buckets.start()
        (loss / self.accumulation_steps).backward()

    def step(self, learning_rate: float) -> Tensor | None:
        self._num_micro_batches += 1
        if self._num_micro_batches % self.accumulation_steps:
            return None
        self._buckets.finish()
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        grad_norm = gradient_norm(parameters)
        self.found_nonfinite.logical_or_(~torch.isfinite(grad_norm))
        if self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, grad_norm)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
            optimizer.step()
        self.module.zero_grad(set_to_none=True)
        return grad_norm

    def snapshot(self) -> FileWriters:
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        state = {"module": self.module.state_dict()}
        state |= {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return {"state.pt": torch_save_writer(state)}

    def repartition(self, folder: Path, ranks: Collection[int], old_world_size: int) -> None:
        """Do nothing: the state does not depend on the number of workers."""

    def load(self, folder: Path, same_world_size: bool) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["module"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
