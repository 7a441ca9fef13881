"""Generator and discriminator losses, R1 penalty, and adaptive weight of the adversarial loss.

Logits may have any shape; positive logits mean real. A discriminator with several heads has logits of each, and every
head has the same weight, whatever its number of logits. All losses are scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.runtime.collectives import average_over_workers

Objective = Literal["non_saturating", "hinge"]
# Logits of a discriminator, or of each of its heads.
Logits = Tensor | tuple[Tensor, ...]


def mean_over_heads(logits: Logits, function: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Return the mean of a function of the logits: over the logits of each head, then over the heads."""
    if isinstance(logits, Tensor):
        return function(logits).mean()
    return torch.stack([function(head).mean() for head in logits]).mean()


def generator_loss(fake: Logits, objective: Objective) -> Tensor:
    """Return the generator loss: mean softplus(-D(x̂)) (Goodfellow et al., 2014), or -mean D(x̂) with hinge."""
    if objective == "non_saturating":
        return mean_over_heads(fake, lambda x: F.softplus(-x))
    return -mean_over_heads(fake)


def discriminator_loss(real: Logits, fake: Logits, objective: Objective) -> Tensor:
    """Return the mean of the losses on real and on reconstructed (fake) images."""
    if objective == "non_saturating":
        return 0.5 * (mean_over_heads(real, lambda x: F.softplus(-x)) + mean_over_heads(fake, F.softplus))
    return 0.5 * (mean_over_heads(real, lambda x: F.relu(1 - x)) + mean_over_heads(fake, lambda x: F.relu(1 + x)))


def r1_penalty(real: Logits, images_B: Tensor, create_graph: bool = True) -> Tensor:
    """Return the mean of ‖∇D‖² at real images (Mescheder et al., 2018), without the factor gamma / 2.

    D is the sum of an image's logits; with several heads, the mean over the heads of their mean logits.

    Args:
        real: logits (B, …) of `images_B`.
        images_B: images (B, C, H, W) or clips (B, C, T, H, W) that require gradients.
        create_graph: give the penalty a gradient; False returns its value only.
    """
    total = real.sum() if isinstance(real, Tensor) else mean_over_heads(real) * len(images_B)
    [gradient_B] = torch.autograd.grad(total, images_B, retain_graph=True, create_graph=create_graph)
    return gradient_B.float().square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return ‖∇ reconstruction‖ / ‖∇ adversarial‖ at the last layer (Esser et al., 2021), in [0, 1e4], detached.

    The gradients are those of the global batch: they are averaged over workers, collectively.
    """
    losses = (reconstruction, adversarial)
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses]
    reconstruction_gradient, adversarial_gradient = average_over_workers(torch.stack(gradients))
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
