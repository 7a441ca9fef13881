"""Copies of a run's state in host memory, so that training goes on while they are written.

GPU or host tensors ──copied──▶ host memory ──by a thread──▶ files
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

# What writes a file to a path, by the file's name; holds everything that it writes.
FileWriters = dict[str, Callable[[Path], None]]


def copy_to_host(value: Any) -> Any:
    """A copy that shares nothing with the original; tensors are on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(copy_to_host(item) for item in value)
    return copy.deepcopy(value)


def torch_save_writer(value: Any) -> Callable[[Path], None]:
    """Writes a copy of `value` as `torch.save` does."""
    return partial(torch.save, copy_to_host(value))


def safetensors_writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """Writes copies of tensors in the safetensors format."""
    return partial(safetensors.torch.save_file, copy_to_host(tensors))


def with_prefix(prefix: str, files: FileWriters) -> FileWriters:
    """The same files in a folder."""
    return {f"{prefix}/{name}": write for name, write in files.items()}
