"""Private checkpoint format of DeepSpeed's ZeRO; contract tests are in tests/runtime/test_internals.py.

    parameter group ─▶ segments, each divided among all workers ─▶ flat tensor of a worker: its parts of all segments

Why: a ZeRO checkpoint is written as one file per worker, which another number of workers cannot load. DeepSpeed's own
    converter needs the files of all workers on every node.
Seen in: DeepSpeed 0.19.8, `state_dict` of `DeepSpeedZeroOptimizer` and `DeepSpeedZeroOptimizer_Stage3`.
Public replacement: a conversion to the universal format that reads only the files it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_WEIGHTS = "fp32 weights"
# Keys of the files.
_FILE_STATE, _WORLD_SIZE, _FROZEN = "optimizer_state_dict", "dp_world_size", "frozen_param_fragments"


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group as ZeRO divides it.

    Attributes:
        segments: number of elements of each segment.
        alignment: the number of elements of a worker's part of a segment is a multiple of this.
    """

    segments: tuple[int, ...]
    alignment: int


def flat_groups(engine: Any) -> list[FlatGroup]:
    """Return the parameter groups of ZeRO-1, ZeRO-2 (a group is one segment) or ZeRO-3 (each parameter is one).

    Contract test: test_flat_groups_describe_partitions_of_zero.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return [FlatGroup(tuple(p.ds_numel for p in group), 1) for group in optimizer.fp16_groups]
    assert not any(any(paddings) for paddings in optimizer.round_robin_bit16_padding)
    alignment = optimizer.nccl_start_alignment_factor
    return [FlatGroup((sum(p.numel() for p in group),), alignment) for group in optimizer.bit16_groups]


def load_partition(path: Path) -> Any:
    """Load a worker's file of optimizer states; its tensors stay on disk until they are read."""
    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)


def flat_tensors(state: Any) -> list[dict[str, Tensor]]:
    """Return the flat tensors in a worker's file, by group and name; a worker's padding may be missing at their end.

    Contract test: test_flat_tensors_are_replaced_in_file.
    """
    optimizer_state, weights = _states(state)
    groups: list[dict[str, Tensor]] = []
    for index, flat_weights in enumerate(weights):
        values = optimizer_state["state"].get(index, {})
        flat = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.dim() == 1}
        groups.append({_WEIGHTS: flat_weights.reshape(-1), **flat})
    return groups


def replace_flat_tensors(state: Any, groups: Sequence[Mapping[str, Tensor]]) -> None:
    """Replace the flat tensors in a worker's file.

    Contract test: test_flat_tensors_are_replaced_in_file.
    """
    optimizer_state, weights = _states(state)
    for index, group in enumerate(groups):
        weights[index] = group[_WEIGHTS]
        if index in optimizer_state["state"]:
            optimizer_state["state"][index] |= {name: value for name, value in group.items() if name != _WEIGHTS}


def _states(state: Any) -> tuple[Any, list[Tensor]]:
    """Return the state of the inner optimizer and the fp32 weights by group."""
    zero_state = state[_FILE_STATE]
    if "fp32_flat_groups" in zero_state:
        return zero_state["optimizer_state_dict"], zero_state["fp32_flat_groups"]
    return zero_state["base_optimizer_state"], zero_state["single_partition_of_fp32_groups"]


def write_model_state(source: Path, target: Path, world_size: int) -> None:
    """Copy a file of weights, as if `world_size` workers had written it.

    Parameters that are not trained are left out, because ZeRO-3 divides them too.

    Contract test: test_flat_tensors_are_replaced_in_file.
    """
    state = torch.load(source, map_location="cpu", weights_only=False, mmap=True)
    assert {_WORLD_SIZE, _FROZEN} <= state.keys()
    torch.save({**state, _WORLD_SIZE: world_size, _FROZEN: None}, target)
