"""Copies of training state in host memory, so that training continues while they are written.

GPU or host tensors ──copy──▶ host memory ──writer thread──▶ files
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

# By file name, a function that writes the file to a path. It owns the data that it writes.
FileWriters = dict[str, Callable[[Path], None]]


def copy_to_host(value: Any) -> Any:
    """Return a deep copy whose tensors are on the CPU; dictionaries, lists and tuples are copied recursively."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(copy_to_host(item) for item in value)
    return copy.deepcopy(value)


def torch_save_writer(value: Any) -> Callable[[Path], None]:
    """Copy `value` to host memory and return a function that writes the copy with `torch.save`."""
    return partial(torch.save, copy_to_host(value))


def safetensors_writer(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """Copy tensors to host memory and return a function that writes the copies in the safetensors format."""
    return partial(safetensors.torch.save_file, copy_to_host(tensors))


def with_prefix(prefix: str, files: FileWriters) -> FileWriters:
    """Return the same writers with file names in the folder `prefix`."""
    return {f"{prefix}/{name}": write for name, write in files.items()}
