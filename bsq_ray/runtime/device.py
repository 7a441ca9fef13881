"""Device that a process computes on."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """Return the first visible GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
