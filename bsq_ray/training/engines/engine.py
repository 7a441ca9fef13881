"""Optimization engines: gradients, optimizer state and their partition over the workers.

    loss ─▶ engine.backward ─▶ (last micro batch) all-reduce ─▶ clip ─▶ optimizer ─▶ weights

A stage has one engine per module that it optimizes. Two engines in one process are correct under three rules:

- `engine(...)` is called once before its `engine.backward(loss)`.
- A module that is called several times in a step, or that `autograd.grad` runs through, is called as
  `engine.module(...)`.
- The graph of a backward pass contains no trainable parameters of another engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.training.checkpoints.host_snapshot import FileWriters
from bsq_ray.training.optimizers.build import build_adamw, build_optimizers

# By the names of DeepSpeed's setting.
COMMUNICATION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine(ABC):
    """A module and its optimizer.

    Attributes:
        module: the module without the engine's wrapper.
        found_nonfinite: fp32 scalar on the device that all engines of a run share; 1 after a gradient norm that is not
            finite. While it is not 0, no step changes weights and optimizer state.
    """

    module: nn.Module
    found_nonfinite: Tensor

    @abstractmethod
    def __call__(self, *inputs: Tensor | tuple[Tensor, ...] | None) -> Any:
        """Run the forward pass that `backward` belongs to."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro batch; `loss` is a scalar."""

    @abstractmethod
    def step(self, learning_rate: float) -> Tensor | None:
        """End a micro batch; after the last one, average gradients over workers, clip and optimize.

        A gradient norm that is not finite sets `found_nonfinite`.

        Returns:
            The gradient norm before clipping after the last micro batch, a scalar on the device; otherwise None.
        """

    @abstractmethod
    def snapshot(self) -> FileWriters:
        """Copy this worker's part of the state to host memory; collective."""

    def loads_file(self, name: str, ranks: Collection[int], old_world_size: int) -> bool:
        """Return True if the workers of these ranks load this file of a `snapshot` of `old_world_size` workers."""
        return True

    @abstractmethod
    def repartition(self, folder: Path, ranks: Collection[int], old_world_size: int) -> None:
        """Convert a checkpoint of another number of workers for those of these ranks; one worker of a node calls it.

        Args:
            folder: local folder with the files that `loads_file` selects.
        """

    @abstractmethod
    def load(self, folder: Path, same_world_size: bool) -> None:
        """Load the files of `snapshot`; collective.

        Args:
            folder: local folder with the files that `loads_file` selects.
            same_world_size: the checkpoint was written by as many workers; otherwise `repartition` has run.
        """

    @contextmanager
    def gathered_parameters(self, modify: bool = False) -> Iterator[None]:
        """Make the parameters of `module` complete on every worker within the context; collective.

        Args:
            modify: broadcast what rank 0 writes into the parameters. The optimizer's own copy does not follow, so use
                it only after the last step.
        """
        yield


def build_engine(
    module: nn.Module,
    training_config: config.TrainingConfig,
    *,
    micro_batch: int,
    accumulation_steps: int,
    device: torch.device,
    use_bf16: bool = False,
    found_nonfinite: Tensor | None = None,
) -> Engine:
    """Build the engine that a configuration names.

    Args:
        module: on `device`, with the same weights on every worker.
        micro_batch: samples of one worker's micro batch.
        accumulation_steps: micro batches per step.
        use_bf16: run the forward pass in bf16 autocast; the weights stay fp32.
        found_nonfinite: see `Engine`; None creates one for this engine alone.

    Raises:
        ValueError: DeepSpeed already uses another device type in this process.
    """
    from bsq_ray.training.engines.data_parallel_engine import DataParallelEngine
    from bsq_ray.training.engines.deepspeed_engine import DeepSpeedEngine, run_forward_in_autocast

    if found_nonfinite is None:
        found_nonfinite = torch.zeros((), device=device)
    if training_config.engine.kind == "ddp":
        optimizers = build_optimizers(module, training_config.optimizer, use_bf16=use_bf16)
        max_grad_norm = training_config.optimizer.max_grad_norm
        communication_dtype = COMMUNICATION_DTYPES[training_config.engine.communication_data_type]
        return DataParallelEngine(
            module, optimizers, max_grad_norm, accumulation_steps, found_nonfinite, communication_dtype
        )
    optimizer = build_adamw(module.parameters(), training_config.optimizer)
    if use_bf16:
        run_forward_in_autocast(module, device)
    return DeepSpeedEngine(module, optimizer, training_config, micro_batch, accumulation_steps, found_nonfinite)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the L2 norm of all gradients together, a scalar on their device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
