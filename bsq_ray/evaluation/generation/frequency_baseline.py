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


def frequency_bits(counted: TokenSource, paid: TokenSource, sub_bits: int) -> float:
    """Bits per token of `paid` under `counted`'s frequencies at each place, by class or for all, whichever is less.

    A frequency is mixed with the one over all places, and that with a uniform one, so that nothing has probability 0.
    """
    tokens_PNS, labels_P = _read(counted, sub_bits)
    paid_PNS, paid_labels_P = _read(paid, sub_bits)
    values = 2**sub_bits
    _, tokens, count = tokens_PNS.shape
    anywhere_SV = np.stack([np.bincount(tokens_PNS[..., s].ravel(), minlength=values) for s in range(count)])
    prior_SV = (anywhere_SV + 1) / (anywhere_SV.sum(1, keepdims=True) + values)
    best = np.inf
    for smoothing in _SMOOTHINGS:
        by_class, at_all = 0.0, 0.0
        for n in range(tokens):
            for s in range(count):
                counts_V = np.bincount(tokens_PNS[:, n, s], minlength=values)
                all_V = (counts_V + smoothing * prior_SV[s]) / (counts_V.sum() + smoothing)
                at_all -= np.log2(all_V[paid_PNS[:, n, s]]).sum()
                for label in np.unique(paid_labels_P):
                    own_V = np.bincount(tokens_PNS[labels_P == label, n, s], minlength=values)
                    own_V = (own_V + smoothing * all_V) / (own_V.sum() + smoothing)
                    by_class -= np.log2(own_V[paid_PNS[paid_labels_P == label, n, s]]).sum()
        best = min(best, by_class, at_all)
    return float(best / paid_PNS.shape[0] / paid_PNS.shape[1])


def _read(source: TokenSource, sub_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Sub-tokens (P, N, S) in as few bytes as hold them, and labels."""
    facts = source.table.info
    small = np.min_scalar_type(2**sub_bits - 1)
    tokens, labels = [], []
    for block in source.iter_blocks():
        bits = unpack_bits(torch.from_numpy(block.values_P), facts.num_tokens * facts.bits)
        bits_PNL = bits.unflatten(1, (facts.num_tokens, facts.bits))
        tokens.append(bits_to_integers(bits_PNL, sub_bits).numpy().astype(small))
        labels.append(block.labels_P)
    return np.concatenate(tokens), np.concatenate(labels)
