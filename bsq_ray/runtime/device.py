"""Device that a process computes on, and copies to it."""

from __future__ import annotations

import torch
from torch import Tensor


def default_device() -> torch.device:
    """Return the first visible GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for the work enqueued there."""
    # A copy to a GPU from memory that is not pinned waits for its stream.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
