"""Softmax attention, in the form that is fastest where it is computed.

    learning in bf16 on a CPU ─▶ spelt out        PyTorch's fused attention comes back up to five times as slowly there
    anything else ─▶ PyTorch's fused attention

Shape suffixes: B images, H heads, N queries, M keys, E width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys up to which it is faster; the scores that are kept take 6 bytes for every pair of query and key.
_EAGER_MAX_TOKENS = 512


def attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> Tensor:
    """Every query attends to every key, (B, H, N, E)."""
    if not _should_use_eager(q_BHNE, k_BHME):
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME)
    return _softmax_weighted_sum(_scores(q_BHNE, k_BHME), v_BHME)


def causal_attention(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
    """Every query attends to its own key and to those before it, (B, H, N, E)."""
    if not _should_use_eager(q_BHNE, k_BHNE):
        return F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, is_causal=True)
    scores_BHNN = _scores(q_BHNE, k_BHNE)
    future_mask_NN = torch.ones(scores_BHNN.shape[-2:], dtype=torch.bool, device=scores_BHNN.device).triu(1)
    return _softmax_weighted_sum(scores_BHNN.masked_fill(future_mask_NN, -torch.inf), v_BHNE)


def _should_use_eager(q_BHNE: Tensor, k_BHME: Tensor) -> bool:
    trains_on_cpu = q_BHNE.requires_grad and q_BHNE.device.type == "cpu"
    return trains_on_cpu and q_BHNE.dtype == torch.bfloat16 and k_BHME.shape[2] <= _EAGER_MAX_TOKENS


def _scores(q_BHNE: Tensor, k_BHME: Tensor) -> Tensor:
    return (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.transpose(-1, -2)


def _softmax_weighted_sum(scores_BHNM: Tensor, v_BHME: Tensor) -> Tensor:
    return scores_BHNM.float().softmax(-1).to(v_BHME.dtype) @ v_BHME
