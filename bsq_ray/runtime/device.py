"""Device that a process computes on, and copies to it."""

from __future__ import annotations

import torch
from torch import Tensor


def default_device() -> torch.device:
    """Return the first visible GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for the work enqueued there."""
    if device.type != "cuda":
        return values.to(device)
    # A copy from memory that is not pinned or not contiguous, such as a micro batch, waits for the stream.
    return values.contiguous().pin_memory().to(device, non_blocking=True)
