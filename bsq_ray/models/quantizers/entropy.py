"""Entropies of soft binary quantization in O(N·L), or O(N·2^g) for groups of g bits (paper equations 4, 7, 8, 9).

A coordinate takes its positive code with probability sigmoid(logit), independently of the others. The entropy of a
token is therefore the sum over its bits. The codebook entropy is that of the batch-averaged distribution: bit by bit
("analytical", an upper bound), or jointly over groups of bits.

Shape suffixes: N tokens, L bits or coordinates, G groups, K codes of a group or of half a group. Entropies are in nats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray.runtime.collectives import average_over_workers, num_workers


def bit_statistics(u_NL: Tensor, steepness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the per-sample entropy (scalar) and the mean probability of each bit (L,) in one pass.

    A bit's probability is sigmoid(steepness · u). The entropy is the mean over tokens of the summed entropy of their
    bits: exact, in [0, L·ln 2].
    """
    return _BitStatistics.apply(u_NL, steepness)


class _BitStatistics(torch.autograd.Function):
    """Computes both values and both gradients from one sigmoid; autograd would save six arrays instead of two."""

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


def weighted_bit_statistics(logits_NL: Tensor, weights_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of `bit_statistics` if tokens keep different numbers of bits.

    Args:
        weights_NL: 0 for a bit that a token does not keep, otherwise the inverse of the share of the batch's tokens
            that keep the bit. The mean of a bit is then over the tokens that keep it, and means of parts of a batch
            average to that of the batch.
    """
    probability_NL = torch.sigmoid(logits_NL)
    entropy_NL = F.softplus(logits_NL) - logits_NL * probability_NL
    return (entropy_NL * (weights_NL > 0)).sum() / len(logits_NL), (probability_NL * weights_NL).mean(0)


def bitwise_codebook_entropy(
    mean_L: Tensor,
    across_workers: bool = False,
    batch_mean_L: Tensor | None = None,
    share_L: Tensor | None = None,
) -> Tensor:
    """Return the entropy of the batch-averaged bits, summed over bits: the paper's upper bound. Scalar.

    Args:
        mean_L: mean probability of each bit over this worker's batch.
        batch_mean_L: the same over the whole batch, if it is known; then `across_workers` is ignored.
        share_L: weight of each bit in the sum, the share of the batch's tokens that keep it; None: all tokens.
    """
    mean_L = _batch_mean(mean_L, across_workers, batch_mean_L)
    if share_L is not None:
        return (_entropy_terms(torch.stack([mean_L, 1 - mean_L])) * share_L).sum()
    return _entropy_terms(torch.cat([mean_L, 1 - mean_L])).sum()


def grouped_codebook_entropy(
    logits_NL: Tensor,
    group_size: int,
    across_workers: bool = False,
    batch_mean_GKK: Tensor | None = None,
    nested: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the entropy of the batch-averaged distribution over the 2^g codes of each group, summed over groups.

    Args:
        batch_mean_GKK: mean of `mean_group_probabilities` over the whole batch, if it is known; then `across_workers`
            is ignored.
        nested: weights_NL of `weighted_bit_statistics` and share_L of `bitwise_codebook_entropy`; a token keeps whole
            groups. None: tokens keep all bits.
    """
    if nested is None:
        mean_GKK = mean_group_probabilities(logits_NL, group_size)
        return _entropy_terms(_batch_mean(mean_GKK, across_workers, batch_mean_GKK)).sum()
    weights_NL, share_L = nested
    mean_GKK = mean_group_probabilities(logits_NL, group_size, weights_NL)
    terms_GKK = _entropy_terms(_batch_mean(mean_GKK, across_workers, batch_mean_GKK))
    return (terms_GKK.sum((1, 2)) * share_L[::group_size]).sum()


def mean_group_probabilities(logits_NL: Tensor, group_size: int, weights_NL: Tensor | None = None) -> Tensor:
    """Return the batch-averaged distribution over the 2^g codes of each group, (G, K, K) with K·K = 2^g.

    The distribution over a group is the outer product of those over its two halves. The average of outer products is
    one matrix product, so the N·2^g probabilities are never in memory.

    Args:
        weights_NL: see `weighted_bit_statistics`; equal for all bits of a group. None: all weights are 1.
    """
    probability_GNg = torch.sigmoid(logits_NL).unflatten(-1, (-1, group_size)).transpose(0, 1)
    half = group_size // 2
    low_GNK = _joint(probability_GNg[..., :half])
    if weights_NL is not None:
        low_GNK = low_GNK * weights_NL[:, ::group_size].t().unsqueeze(-1)
    high_GNK = _joint(probability_GNg[..., half:])
    return torch.bmm(low_GNK.transpose(1, 2), high_GNK) / logits_NL.shape[0]


def all_reduce_mean(local: Tensor, across_workers: bool) -> Tensor:
    """Average a tensor over all ranks; the gradient is that of this rank's part.

    Data parallelism averages gradients over ranks afterwards, which gives exactly the gradient of the global batch.
    Without gradients there is no collective call, so one rank alone may encode.
    """
    if not across_workers or not torch.is_grad_enabled() or num_workers() == 1:
        return local
    return _with_value_of(local, average_over_workers(local))


def _batch_mean(local: Tensor, across_workers: bool, batch_mean: Tensor | None) -> Tensor:
    if batch_mean is None:
        return all_reduce_mean(local, across_workers)
    return _with_value_of(local, batch_mean)


def _with_value_of(local: Tensor, mean: Tensor) -> Tensor:
    """Return the value of `mean`, which is over all parts of a batch, with the gradient of this part.

    The mean of the gradients of all parts is the gradient of the whole batch, for any function of the mean.
    """
    return local + (mean - local.detach())


def _entropy_terms(p: Tensor) -> Tensor:
    """Return -p·ln p with a finite gradient at p = 0."""
    return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny))


def _joint(probability_GNb: Tensor) -> Tensor:
    """Return the distribution over the 2^b patterns of b independent bits, (G, N, 2^b)."""
    joint_GNK = probability_GNb.new_ones(*probability_GNb.shape[:2], 1)
    for p_GN in probability_GNb.unbind(-1):
        p_GN1 = p_GN.unsqueeze(-1)
        joint_GNK = torch.cat([joint_GNK * (1 - p_GN1), joint_GNK * p_GN1], dim=-1)
    return joint_GNK
