"""Bits per token without a model: frequencies at each position, counted on one table and evaluated on another.

Shape suffixes: P images, N tokens, S sub-tokens of a token, K classes, V values of a sub-token.
"""

from __future__ import annotations

import numpy as np
import torch

from bsq_ray.data.token_table import TokenSource
from bsq_ray.models.quantizers.bits import bits_to_integers, unpack_bits

# Pseudo-counts spread over all values. The baseline is the best of them on the evaluated table, which favors it.
_SMOOTHINGS = (0.1, 1.0, 10.0, 100.0)


def histogram_cross_entropy(fit_source: TokenSource, eval_source: TokenSource, sub_bits: int) -> float:
    """Return the cross entropy of a table under another table's frequencies, bits per token.

    Frequencies are counted at each position, per class or over all classes; the smaller cross entropy counts. They
    are smoothed by the frequencies over all positions, and those by a uniform distribution.

    Args:
        fit_source: table whose frequencies are counted.
        eval_source: table whose tokens are coded.
        sub_bits: bits of a sub-token.
    """
    tokens_PNS, labels_P = _read_sub_tokens(fit_source, sub_bits)
    eval_PNS, eval_labels_P = _read_sub_tokens(eval_source, sub_bits)
    values = 2**sub_bits
    _, tokens, num_sub_tokens = tokens_PNS.shape
    global_counts_SV = np.stack(
        [np.bincount(tokens_PNS[..., s].ravel(), minlength=values) for s in range(num_sub_tokens)]
    )
    prior_SV = (global_counts_SV + 1) / (global_counts_SV.sum(1, keepdims=True) + values)
    best = np.inf
    for smoothing in _SMOOTHINGS:
        class_cost, pooled_cost = 0.0, 0.0
        for n in range(tokens):
            for s in range(num_sub_tokens):
                counts_V = np.bincount(tokens_PNS[:, n, s], minlength=values)
                all_V = (counts_V + smoothing * prior_SV[s]) / (counts_V.sum() + smoothing)
                pooled_cost -= np.log2(all_V[eval_PNS[:, n, s]]).sum()
                for label in np.unique(eval_labels_P):
                    own_V = np.bincount(tokens_PNS[labels_P == label, n, s], minlength=values)
                    own_V = (own_V + smoothing * all_V) / (own_V.sum() + smoothing)
                    class_cost -= np.log2(own_V[eval_PNS[eval_labels_P == label, n, s]]).sum()
        best = min(best, class_cost, pooled_cost)
    return float(best / eval_PNS.shape[0] / eval_PNS.shape[1])


def _read_sub_tokens(source: TokenSource, sub_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sub-tokens (P, N, S) in the smallest integer type, and labels (P,)."""
    table_info = source.table.info
    small = np.min_scalar_type(2**sub_bits - 1)
    tokens, labels = [], []
    for block in source.iter_blocks():
        bits = unpack_bits(torch.from_numpy(block.values_P), table_info.num_tokens * table_info.bits)
        bits_PNL = bits.unflatten(1, (table_info.num_tokens, table_info.bits))
        tokens.append(bits_to_integers(bits_PNL, sub_bits).numpy().astype(small))
        labels.append(block.labels_P)
    return np.concatenate(tokens), np.concatenate(labels)
