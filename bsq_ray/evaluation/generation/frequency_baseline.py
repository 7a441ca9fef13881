"""What tokens cost without a model: frequencies at each place, counted on one table and paid on another.

Shape suffixes: P images, N tokens, S sub-tokens of a token, K classes, V values of a sub-token.
"""

from __future__ import annotations

import numpy as np
import torch

from bsq_ray.data.token_table import TokenSource
from bsq_ray.models.quantizers.bits import bits_to_integers, unpack_bits

# Pseudo-counts spread over all values; the cheapest is taken, which flatters the baseline.
_SMOOTHINGS = (0.1, 1.0, 10.0, 100.0)


def histogram_cross_entropy(fit_source: TokenSource, eval_source: TokenSource, sub_bits: int) -> float:
    """Bits per token of `paid` under `counted`'s frequencies at each place, by class or for all, whichever is less.

    A frequency is mixed with the one over all places, and that with a uniform one, so that nothing has probability 0.
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
    """Sub-tokens (P, N, S) in as few bytes as hold them, and labels."""
    table_info = source.table.info
    small = np.min_scalar_type(2**sub_bits - 1)
    tokens, labels = [], []
    for block in source.iter_blocks():
        bits = unpack_bits(torch.from_numpy(block.values_P), table_info.num_tokens * table_info.bits)
        bits_PNL = bits.unflatten(1, (table_info.num_tokens, table_info.bits))
        tokens.append(bits_to_integers(bits_PNL, sub_bits).numpy().astype(small))
        labels.append(block.labels_P)
    return np.concatenate(tokens), np.concatenate(labels)
