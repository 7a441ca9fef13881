"""Entropies of soft binary quantisation in O(N·L), or O(N·2^g) for groups of g bits (paper equations 4, 7, 8, 9).

A coordinate takes its positive code with probability sigmoid(logit), independently of the others, so the entropy of one
token is the sum over its bits. The entropy of the whole batch is that of the averaged distribution: bit by bit
("analytical", an upper bound), or jointly over groups of bits.

Shape suffixes: N tokens, L bits or coordinates, G groups, K codes of a group or of half a group. Entropies are in nats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def bit_statistics(u_NL: Tensor, steepness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Per-sample entropy (scalar) and the mean probability of each bit (L,), in one pass over the coordinates.

    A bit's probability is sigmoid(steepness · u). The entropy is the mean over tokens of the summed entropy of their
    bits: exact, in [0, L·ln 2].
    """
    return _BitStatistics.apply(u_NL, steepness)


class _BitStatistics(torch.autograd.Function):
    """One sigmoid serves both values and both gradients; written out, autograd would keep six arrays instead of two."""

    @staticmethod
    def forward(ctx: Any, u_NL: Tensor, steepness: float) -> tuple[Tensor, Tensor]:
        logits_NL = u_NL * steepness
        probability_NL = torch.sigmoid(logits_NL)
        ctx.save_for_backward(logits_NL, probability_NL)
        ctx.steepness = steepness
        # H(sigmoid(x)) = softplus(x) - x·sigmoid(x) holds for every x without a logarithm of a probability.
        entropy_NL = F.softplus(logits_NL).addcmul_(logits_NL, probability_NL, value=-1)
        return entropy_NL.sum() / len(logits_NL), probability_NL.mean(0)

    @staticmethod
    def backward(ctx: Any, entropy_gradient: Tensor, mean_gradient_L: Tensor) -> tuple[Tensor, None]:
        logits_NL, probability_NL = ctx.saved_tensors
        # dH/dx = -x·p·(1 - p) and dp/dx = p·(1 - p).
        each = ctx.steepness / len(logits_NL)
        slope_NL = torch.addcmul(probability_NL, probability_NL, probability_NL, value=-1)
        inner_NL = torch.addcmul(mean_gradient_L * each, logits_NL, -each * entropy_gradient)
        return slope_NL.mul_(inner_NL), None


def bitwise_codebook_entropy(mean_L: Tensor, across_workers: bool = False) -> Tensor:
    """Entropy of the batch-averaged bits, summed over bits: the paper's upper bound of the code entropy. Scalar.

    Args:
        mean_L: mean probability of each bit over this worker's batch.
    """
    mean_L = all_reduce_mean(mean_L, across_workers)
    return _entropy_terms(torch.cat([mean_L, 1 - mean_L])).sum()


def grouped_codebook_entropy(logits_NL: Tensor, group_size: int, across_workers: bool = False) -> Tensor:
    """Entropy of the batch-averaged distribution over the 2^g codes of each group, summed over groups. Scalar.

    The distribution over a group is the outer product of those over its two halves, and the average of outer products
    is one matrix product, so N·2^g numbers are never held.
    """
    probability_GNg = torch.sigmoid(logits_NL).unflatten(-1, (-1, group_size)).transpose(0, 1)
    half = group_size // 2
    low_GNK = _joint(probability_GNg[..., :half])
    high_GNK = _joint(probability_GNg[..., half:])
    mean_GKK = torch.bmm(low_GNK.transpose(1, 2), high_GNK) / logits_NL.shape[0]
    return _entropy_terms(all_reduce_mean(mean_GKK, across_workers)).sum()


def all_reduce_mean(local: Tensor, across_workers: bool) -> Tensor:
    """The average over all workers, with the gradient of this worker's part alone.

    Gradients are averaged over workers afterwards, which makes the whole exactly the gradient of the joined batch.
    Without gradients nothing is exchanged, so that one worker alone may encode while the others do something else.
    """
    should_reduce = across_workers and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
    if not should_reduce or dist.get_world_size() == 1:
        return local
    reduced = local.detach().clone()
    dist.all_reduce(reduced)
    return local + (reduced / dist.get_world_size() - local.detach())


def _entropy_terms(p: Tensor) -> Tensor:
    """-p·ln p, with a finite gradient at p = 0."""
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny))


def _joint(probability_GNb: Tensor) -> Tensor:
    """Distribution over the 2^b patterns of b independent bits, (G, N, 2^b)."""
    joint_GNK = probability_GNb.new_ones(*probability_GNb.shape[:2], 1)
    for p_GN in probability_GNb.unbind(-1):
        p_GN1 = p_GN.unsqueeze(-1)
        joint_GNK = torch.cat([joint_GNK * (1 - p_GN1), joint_GNK * p_GN1], dim=-1)
    return joint_GNK
