"""Exponential moving average of weights, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """average ← d · average + (1 - d) · weights; d = min(decay, (1 + t) / (10 + t)), so that the start is forgotten.

    Buffers are taken over as they are.

    Args:
        module: whose weights are averaged; the average starts as a copy.
        decay: 0 to 1, exclusive.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: value.detach().float().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = module.state_dict()
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [current[name].float() for name in self.average], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The average and the number of updates."""
        return {**self.average, "updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from a saved average."""
        self.num_updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(state[name])
