"""Scaled dot-product attention with the fastest implementation for the device.

    training in bf16 on a CPU ─▶ eager attention      the backward pass of fused attention is up to 5 times slower there
    everything else ─▶ fused attention

Shape suffixes: B batch, H heads, N queries, M keys, E width of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Eager attention is faster up to this number of keys. It stores 6 bytes per query-key pair for the backward pass.
_EAGER_MAX_KEYS = 512


def attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> Tensor:
    """Attend from every query to every key; return (B, H, N, E)."""
    if not _should_use_eager(q_BHNE, k_BHME):
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME)
    return _softmax_weighted_sum(_scores(q_BHNE, k_BHME), v_BHME)


def causal_attention(q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
    """Attend from every query to its own key and earlier ones; return (B, H, N, E)."""
    if not _should_use_eager(q_BHNE, k_BHNE):
        return F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, is_causal=True)
    scores_BHNN = _scores(q_BHNE, k_BHNE)
    future_mask_NN = torch.ones(scores_BHNN.shape[-2:], dtype=torch.bool, device=scores_BHNN.device).triu(1)
    return _softmax_weighted_sum(scores_BHNN.masked_fill(future_mask_NN, -torch.inf), v_BHNE)


def span_attention(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, spans: tuple[int, int], mask_NM: Tensor | None = None
) -> Tensor:
    """Attend from each span of queries to its own span of keys and to all earlier keys; return (B, N, H, E).

    Args:
        k_BHME, v_BHME: the last spans belong to the spans of the queries.
        spans: queries and keys of a span.
        mask_NM: the pairs of one span (…, N, M) that attend, the same for any two spans; None: all.
    """
    parts = []
    queries = q_BHNE.split(spans[0], 2)
    keys, values = (_prefixes(x_BHME, len(queries), spans[1]) for x_BHME in (k_BHME, v_BHME))
    for q, k, v in zip(queries, keys, values, strict=True):
        if mask_NM is None:
            parts.append(attention(q, k, v).transpose(1, 2))
        else:
            mask = mask_NM.repeat(*(1,) * (mask_NM.ndim - 1), k.shape[2] // spans[1])
            parts.append(masked_attention(q, k, v, mask).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _prefixes(x_BHME: Tensor, num_spans: int, span: int) -> list[Tensor]:
    """Return the prefixes of x that end with each of the last `num_spans` spans, shortest first.

    Each prefix is a slice of the next longer one. As a slice of x, its gradient would be padded to the length of x.
    """
    prefixes = [x_BHME]
    while len(prefixes) < num_spans:
        prefixes.append(prefixes[-1][:, :, :-span])
    return prefixes[::-1]


def masked_attention(q_BHNE: Tensor, k_BHME: Tensor, v_BHME: Tensor, mask_NM: Tensor) -> Tensor:
    """Attend from every query to the keys for which the mask (…, N, M) is True."""
    if not _should_use_eager(q_BHNE, k_BHME):
        return F.scaled_dot_product_attention(q_BHNE, k_BHME, v_BHME, attn_mask=mask_NM)
    return _softmax_weighted_sum(_scores(q_BHNE, k_BHME).masked_fill(~mask_NM, -torch.inf), v_BHME)


def split_heads(qkv_BNF: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused QKV projection (B, N, 3·H·E) into query, key and value, (B, H, N, E) each."""
    q_BHNE, k_BHNE, v_BHNE = qkv_BNF.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q_BHNE, k_BHNE, v_BHNE


def merge_heads(y_BHNE: Tensor) -> Tensor:
    """Concatenate the heads: (B, H, N, E) to (B, N, H·E)."""
    return y_BHNE.transpose(1, 2).flatten(2)


def _should_use_eager(q_BHNE: Tensor, k_BHME: Tensor) -> bool:
    is_training_on_cpu = q_BHNE.requires_grad and q_BHNE.device.type == "cpu"
    return is_training_on_cpu and q_BHNE.dtype == torch.bfloat16 and k_BHME.shape[2] <= _EAGER_MAX_KEYS


def _scores(q_BHNE: Tensor, k_BHME: Tensor) -> Tensor:
    return (q_BHNE * q_BHNE.shape[-1] ** -0.5) @ k_BHME.transpose(-1, -2)


def _softmax_weighted_sum(scores_BHNM: Tensor, v_BHME: Tensor) -> Tensor:
    return scores_BHNM.float().softmax(-1).to(v_BHME.dtype) @ v_BHME
