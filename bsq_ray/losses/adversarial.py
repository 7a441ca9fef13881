"""Losses of generator and discriminator, the R1 penalty, and the adaptive weight.

Logits have any shape; a positive one says "real".
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Literal["non_saturating", "hinge"]


def generator_loss(fake: Tensor, objective: Objective) -> Tensor:
    """What the generator minimises: mean softplus(-D(x̂)) (Goodfellow et al., 2014), or -mean D(x̂) with hinge."""
    return F.softplus(-fake).mean() if objective == "non_saturating" else -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, objective: Objective) -> Tensor:
    """Half the sum of the losses on real and on reconstructed images."""
    if objective == "non_saturating":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def r1_penalty(real: Tensor, images_B: Tensor) -> Tensor:
    """Mean squared norm of the gradient of D at real images or clips (Mescheder et al., 2018); multiply by gamma / 2.

    Args:
        real: logits of `images_B`, (B, …), which require gradients.
    """
    [gradient_B] = torch.autograd.grad(real.sum(), images_B, create_graph=True)
    return gradient_B.float().square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two losses' gradient norms at the last layer, at most 1e4 (Esser et al., 2021). Detached."""
    [reconstruction_gradient] = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    [adversarial_gradient] = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
