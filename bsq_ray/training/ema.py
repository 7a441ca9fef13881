"""Exponential moving average of weights, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Averages parameters and buffers with decay d: average ← d · average + (1 - d) · weights.

    The decay of update t is d = min(decay, (1 + t) / (10 + t)), so that the average forgets the initial weights.

    Args:
        module: the average starts as an fp32 copy of its state dict, without parameters that require no gradients.
        decay: upper limit of d, 0 ≤ decay < 1.
    """

    # torch.optim.swa_utils.AveragedModel copies the module, which fails for parameters that ZeRO-3 has partitioned,
    # and its state dict is not this checkpoint format. Its averaging function is used below.

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        self.average = {
            name: value.detach().float().clone() for name, value in module.state_dict().items() if name not in frozen
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Update the average with the module's weights, which must be complete on this worker."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = module.state_dict()
        averages = list(self.average.values())
        get_ema_multi_avg_fn(decay)(averages, [current[name].float() for name in self.average], self.num_updates)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, and the number of updates as "updates"."""
        return {**self.average, "updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state dict in place."""
        self.num_updates = int(state["updates"])
        for name, value in self.average.items():
            value.copy_(state[name])
