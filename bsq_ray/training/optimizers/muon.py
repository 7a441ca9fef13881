"""Muon (Jordan et al., 2024): momentum whose matrices are orthogonalized before they are applied.

    averaged gradients ─▶ momentum (every worker) ─▶ orthogonalize (each matrix on one worker)
                       ─▶ all-gather ─▶ weights (every worker)

The elementwise work is repeated on every worker, and the matrix products, which cost a hundred times as much, are
divided among them. So the state is the same everywhere, and a checkpoint does not depend on the number of workers.

Shape suffixes: B matrices of one shape, M rows and N columns of a matrix, M ≤ N inside the iteration.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsq_ray.runtime.collectives import num_workers

# Coefficients of the quintic iteration, chosen for the largest slope at zero (Jordan et al., 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPS = 1e-7
# Root mean square of AdamW's updates; with it, learning rates of AdamW carry over (Liu et al., 2025, section 2.2).
_ADAMW_RMS = 0.2


def orthogonalize(x_BMN: Tensor, ns_steps: int = 5) -> Tensor:
    """Map each matrix U S Vᵀ to about U Vᵀ, by Newton-Schulz iterations.

    After five, the singular values of the result are between about 0.7 and 1.2 and not exactly 1, which does not harm
    training. After fewer, those that are small in relation to the Frobenius norm stay below.

    Args:
        x_BMN: (B, M, N) or (B, N, M), float32 or bfloat16; the products are computed in its type.
        ns_steps: number of iterations.

    Returns:
        Tensor of the same shape and type.
    """
    is_tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    if is_tall:
        x_BMN = x_BMN.mT
    # The iteration converges for spectral norms up to 1, and the Frobenius norm is an upper bound of them.
    x_BMN = x_BMN / torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    # On two CPU cores 1.5 to 1.7 times as fast for N = 3 M and 4 M, and slower for square matrices.
    is_wide = x_BMN.shape[-1] >= 2 * x_BMN.shape[-2]
    iterate = _iterate_gram if is_wide and x_BMN.dtype == torch.float32 else _iterate
    x_BMN = iterate(x_BMN, ns_steps)
    return x_BMN.mT if is_tall else x_BMN


def _iterate(x_BMN: Tensor, ns_steps: int) -> Tensor:
    """Apply x ← a x + (b g + c g²) x with g = x xᵀ, `ns_steps` times."""
    a, b, c = _COEFFICIENTS
    for _ in range(ns_steps):
        gram_BMM = x_BMN @ x_BMN.mT
        polynomial_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, polynomial_BMM, x_BMN, beta=a)
    return x_BMN


def _iterate_gram(x_BMN: Tensor, ns_steps: int) -> Tensor:
    """Return the result of `_iterate` with products of M × M matrices only, but for the first and the last one.

    All factors are polynomials of the first Gram matrix g, so they commute: with p = a + b g + c g², the next Gram
    matrix is p g p, and the result is the product of all p, times x. It needs the range of float32.
    """
    a, b, c = _COEFFICIENTS
    gram_BMM = x_BMN @ x_BMN.mT
    identity_MM = torch.eye(gram_BMM.shape[-1], dtype=gram_BMM.dtype, device=gram_BMM.device)
    product_BMM: Tensor | None = None
    for iteration in range(ns_steps):
        factor_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c) + a * identity_MM
        product_BMM = factor_BMM if product_BMM is None else factor_BMM @ product_BMM
        if iteration < ns_steps - 1:
            gram_BMM = factor_BMM @ gram_BMM @ factor_BMM
    assert product_BMM is not None
    return product_BMM @ x_BMN


class Muon(torch.optim.Optimizer):
    """Optimize matrices with momentum, Nesterov's correction, orthogonalization and decoupled weight decay.

    With one worker and `dtype` bfloat16 it takes the steps of `torch.optim.Muon` with `match_rms_adamw`.

    Args:
        matrices: parameters of two or more dimensions, in the same order on every worker. All dimensions after the
            first are the columns of a matrix.
        lr: learning rate, on the scale of AdamW's.
        lr_ratio: learning rate divided by that of the other parameters; the engine multiplies their rate by it.
        momentum: decay rate of the momentum.
        weight_decay: fraction of the weights that is subtracted, times the learning rate.
        ns_steps: iterations of `orthogonalize`.
        dtype: type in which matrices are orthogonalized and exchanged, bfloat16 or float32.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        lr_ratio: float,
        momentum: float,
        weight_decay: float,
        ns_steps: int,
        dtype: torch.dtype,
    ) -> None:
        defaults = {"lr": lr, "lr_ratio": lr_ratio, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(matrices, defaults)
        self.ns_steps, self.dtype = ns_steps, dtype
        # As fused optimizers of PyTorch have it: while this scalar is 1, steps change neither weights nor momentum.
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; collective. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
            updates = _orthogonalize_on_owners(directions, self.ns_steps) if directions else []
            for parameter, update in zip(parameters, updates, strict=True):
                decay: Tensor | float = 1 - group["lr"] * group["weight_decay"]
                if self.found_inf is not None:
                    is_applied = (self.found_inf == 0).to(parameter.dtype)
                    decay, update = is_applied * decay + (1 - is_applied), is_applied * update
                parameter.mul_(decay)
                scale = _ADAMW_RMS * math.sqrt(max(update.shape))
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _direction(self, parameter: nn.Parameter, decay: float) -> Tensor:
        """Update the momentum with the gradient, and return it with Nesterov's correction, as a matrix."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        gradient = parameter.grad
        if self.found_inf is not None:
            # The momentum stays what it is, and the direction is finite.
            gradient = torch.where(self.found_inf == 0, gradient, momentum)
        momentum.lerp_(gradient, 1 - decay)
        return gradient.lerp(momentum, decay).flatten(1).to(self.dtype)


def _orthogonalize_on_owners(directions: list[Tensor], ns_steps: int) -> list[Tensor]:
    """Orthogonalize each matrix on one worker, and return all results on every worker; collective."""
    world_size = num_workers()
    if world_size == 1:
        return _orthogonalize_by_shape(directions, ns_steps)
    owned_by = assign_owners([tuple(direction.shape) for direction in directions], world_size)
    own = _orthogonalize_by_shape([directions[index] for index in owned_by[dist.get_rank()]], ns_steps)
    # Shares are padded to the size of the largest, as the collective needs equal sizes.
    size = max(sum(directions[index].numel() for index in indexes) for indexes in owned_by)
    share = directions[0].new_zeros(size)
    if own:
        flat = torch.cat([update.reshape(-1) for update in own])
        share[: len(flat)] = flat
    shares = share.new_empty(world_size * size)
    dist.all_gather_into_tensor(shares, share)
    updates = list(directions)
    for indexes, part in zip(owned_by, shares.split(size), strict=True):
        offset = 0
        for index in indexes:
            shape = directions[index].shape
            updates[index] = part[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
    return updates


def _orthogonalize_by_shape(matrices: list[Tensor], ns_steps: int) -> list[Tensor]:
    """Orthogonalize matrices of one shape together."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    results = list(matrices)
    for indexes in by_shape.values():
        batch = orthogonalize(torch.stack([matrices[index] for index in indexes]), ns_steps)
        for index, result in zip(indexes, batch, strict=True):
            results[index] = result
    return results


def assign_owners(shapes: list[tuple[int, ...]], world_size: int) -> list[list[int]]:
    """Divide matrices among workers so that the largest share of the work is small.

    Args:
        shapes: (rows, columns) of each matrix.

    Returns:
        Indexes of the matrices of each worker. The same on every worker.
    """
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    owned_by: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    # The most expensive first, each to the worker with the least work.
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owner = loads.index(min(loads))
        owned_by[owner].append(index)
        loads[owner] += costs[index]
    return owned_by
