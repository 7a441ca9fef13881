"""Private APIs of DeepSpeed, one function each; contract tests are in tests/runtime/test_internals.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def capture_checkpoint(engine: Any, folder: str, tag: str, on_save: Callable[[Any, str], None]) -> None:
    """Run `engine.save_checkpoint`, but pass every state to `on_save(state, path)` instead of writing it.

    Why: asynchronous checkpoints need the state in host memory, and `save_checkpoint` writes files.
    Seen in: DeepSpeed 0.19.8, where `create_checkpoint_engine` accepts only DeepSpeed's own checkpoint engines.
    Public replacement: a configuration key that accepts a checkpoint engine.
    Contract test: test_capture_checkpoint_writes_no_state.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class CapturingCheckpointEngine(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            on_save(state_dict, path)

    original_engine = engine.checkpoint_engine
    engine.checkpoint_engine = CapturingCheckpointEngine()
    try:
        engine.save_checkpoint(folder, tag=tag)
    finally:
        engine.checkpoint_engine = original_engine


def global_gradient_norm(engine: Any) -> Tensor:
    """Return the norm that ZeRO has just computed, infinite if a gradient is not finite; valid within its `step`.

    Why: a step with a nonfinite norm is skipped on the device, in a hook of the inner optimizer's step.
    Seen in: DeepSpeed 0.19.8, where `engine.get_global_grad_norm()` returns it only after the step.
    Public replacement: a `get_global_grad_norm` that is valid within the step.
    Contract test: test_unread_gradient_norm_is_infinite_within_step.
    """
    norm: Tensor = engine.optimizer._global_grad_norm
    return norm


def keep_gradient_norm_on_device() -> None:
    """Keep ZeRO from reading the gradient norm on the host in every step; for all engines of this process.

    Why: the host would wait for the backward pass. The caller skips steps with a nonfinite norm on the device.
    Seen in: DeepSpeed 0.19.8. Its setting `zero_optimization.compute_grad_norm=false` avoids the read by computing
        neither norm nor clipping, and stage 3 does not have it.
    Public replacement: a setting that leaves the check of the norm to the caller.
    Contract test: test_unread_gradient_norm_is_infinite_within_step.
    """
    for name in ("stage_1_and_2", "stage3"):
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        for function in (is_invalid_grad_norm, mask_nan_or_inf_with_val_inplace):
            assert hasattr(module, function.__name__)
            setattr(module, function.__name__, function)


def is_invalid_grad_norm(norm: Any) -> bool:
    """Return False without reading the norm, in place of DeepSpeed's function of this name."""
    return False


def mask_nan_or_inf_with_val_inplace(norm: Tensor, device: torch.device | None = None, val: float = -1.0) -> None:
    """Do what DeepSpeed's function of this name does, without copying `val` to the device, which would wait for it."""
    norm.masked_fill_(~torch.isfinite(norm), val)


@dataclass(frozen=True)
class PartitionSlice:
    """Elements `start` to `stop` of a flat parameter, which the worker of rank `owner` optimizes."""

    owner: int
    start: int
    stop: int


def partition_slices(engine: Any) -> dict[nn.Parameter, list[PartitionSlice]]:
    """Return by trainable parameter the owners of its elements in ZeRO-1 and ZeRO-2; slices are in ascending order.

    Why: each worker gets the gradients that it optimizes with, while the backward pass is running.
    Seen in: DeepSpeed 0.19.8, `DeepSpeedZeroOptimizer.param_to_partition_ids` and `grad_start_offset`.
    Public replacement: a function that returns the partitions of a parameter.
    Contract test: test_zero_optimizes_with_averages_of_own_slices.
    """
    optimizer = engine.optimizer
    slices = {}
    for group_index, parameters in enumerate(optimizer.bit16_groups):
        for parameter in parameters:
            parameter_id = optimizer.get_param_id(parameter)
            owners = sorted(optimizer.param_to_partition_ids[group_index].get(parameter_id, ()))
            starts = [optimizer.grad_start_offset[group_index][owner][parameter_id] for owner in owners]
            stops = [*starts[1:], parameter.numel()]
            slices[parameter] = list(map(PartitionSlice, owners, starts, stops))
    return slices


def replace_gradient_averages(engine: Any, averages: Callable[[], Iterable[tuple[nn.Parameter, Tensor]]]) -> None:
    """Make ZeRO-1 and ZeRO-2 send no gradients, and optimize with the averages that the caller computes.

    Why: DeepSpeed sends gradients after the backward pass, either twice the bytes with an all-reduce, or with one
        reduce per worker, each of which waits for the network. With `zero_optimization.overlap_comm` it sends them
        during the backward pass, but the host waits for the device before each reduction.
    Seen in: DeepSpeed 0.19.8, `DeepSpeedZeroOptimizer.average_tensor`.
    Public replacement: a setting for reductions without `synchronize` during the backward pass.
    Contract test: test_zero_optimizes_with_averages_of_own_slices.

    Args:
        averages: yields parameters, and the flat average of the slice that this worker optimizes.
    """
    engine.optimizer.average_tensor = partial(_write_averages, engine.optimizer, averages)


def _write_averages(
    optimizer: Any,
    averages: Callable[[], Iterable[tuple[nn.Parameter, Tensor]]],
    gradients: Tensor,
    communication_data_type: torch.dtype,
) -> None:
    """Replace the slices of this worker in a bucket, in place of DeepSpeed's `average_tensor`.

    Args:
        optimizer: ZeRO optimizer without offloading and overlapping.
        gradients: flat gradients of all parameters that have one, in the order of the bucket.
    """
    rank = dist.get_rank(optimizer.dp_process_group)
    starts, offset = {}, 0
    for group_index, parameter_index, parameter_id in optimizer.ipg_buckets[communication_data_type].params:
        parameter = optimizer.bit16_groups[group_index][parameter_index]
        starts[parameter] = offset + optimizer.grad_start_offset[group_index][rank].get(parameter_id, 0)
        offset += parameter.numel()
    for parameter, average in averages():
        start = starts[parameter]
        gradients[start : start + average.numel()].copy_(average)


def disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory communication operator.

    Why: the operator is compiled at first use on every node and serves only DeepSpeed's own launcher.
    Seen in: DeepSpeed 0.19.8, which has no setting for it.
    Public replacement: an environment variable or configuration key that disables the operator.
    Contract test: test_disable_shared_memory_op_keeps_backend_without_op.
    """
    import deepspeed.comm  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
