"""Generator and discriminator losses, R1 penalty, and adaptive weight of the adversarial loss.

Logits may have any shape; positive logits mean real. All losses are scalars.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.runtime.collectives import average_over_workers

Objective = Literal["non_saturating", "hinge"]


def generator_loss(fake: Tensor, objective: Objective) -> Tensor:
    """Return the generator loss: mean softplus(-D(x̂)) (Goodfellow et al., 2014), or -mean D(x̂) with hinge."""
    return F.softplus(-fake).mean() if objective == "non_saturating" else -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, objective: Objective) -> Tensor:
    """Return the mean of the losses on real and on reconstructed (fake) images."""
    if objective == "non_saturating":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def r1_penalty(real: Tensor, images_B: Tensor, create_graph: bool = True) -> Tensor:
    """Return the mean of ‖∇D‖² at real images (Mescheder et al., 2018), without the factor gamma / 2.

    Args:
        real: logits (B, …) of `images_B`.
        images_B: images (B, C, H, W) or clips (B, C, T, H, W) that require gradients.
        create_graph: give the penalty a gradient; False returns its value only.
    """
    [gradient_B] = torch.autograd.grad(real.sum(), images_B, retain_graph=True, create_graph=create_graph)
    return gradient_B.float().square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return ‖∇ reconstruction‖ / ‖∇ adversarial‖ at the last layer (Esser et al., 2021), in [0, 1e4], detached.

    The gradients are those of the global batch: they are averaged over workers, collectively.
    """
    losses = (reconstruction, adversarial)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    reconstruction_gradient, adversarial_gradient = average_over_workers(torch.stack(gradients))
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
