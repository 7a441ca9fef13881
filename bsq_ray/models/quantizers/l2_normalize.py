"""Projection of vectors onto the unit sphere, with a bounded gradient at the null vector."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

# Vectors up to this length have no direction in fp32.
_NULL_LENGTH = 1e-12


def l2_normalize(v: Tensor) -> Tensor:
    """Return v / |v| over the last dimension; the null vector stays zero and has no gradient.

    `torch.nn.functional.normalize` multiplies the gradient of the null vector by 1e12.
    """
    return cast(Tensor, _L2Normalize.apply(v))


class _L2Normalize(torch.autograd.Function):
    """u = v / |v| with du/dv = (1 - u uᵀ) / |v|, and 0 at the null vector."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        # Dividing by infinity makes both the coordinates and the gradient zero.
        norm = norm.masked_fill_(norm <= _NULL_LENGTH, torch.inf)
        u = v / norm
        ctx.save_for_backward(u, norm)
        return u

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        u, norm = ctx.saved_tensors
        radial = (gradient * u).sum(-1, keepdim=True)
        return torch.addcmul(gradient, u, radial, value=-1).div_(norm)
