"""How much of a codebook is in use, measured without ever listing it.

A token of many bits is cut into sub-tokens of at most 18 bits and each sub-token's codes are counted, so usage can be
measured at 36 bits; at 18 bits or fewer the sub-token is the whole token and the figure is the paper's code usage.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bsq_ray.models.quantizers.bits import bits_to_integers

_MAX_SUB_BITS = 18


class CodeUsage:
    """Counts of the codes seen.

    Args:
        bits: bits of a token (L).
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.sub_bits = max(width for width in range(1, min(bits, _MAX_SUB_BITS) + 1) if bits % width == 0)
        self._counts_SK = np.zeros((bits // self.sub_bits, 2**self.sub_bits), np.int64)
        self._ones_L = np.zeros(bits, np.int64)
        self._num_tokens = 0

    def update(self, bits_BNL: Tensor) -> None:
        """Counts the tokens of a batch."""
        tokens_NL = bits_BNL.detach().cpu().reshape(-1, self.bits)
        for counts_K, code_N in zip(
            self._counts_SK, bits_to_integers(tokens_NL, self.sub_bits).unbind(-1), strict=True
        ):
            counts_K += torch.bincount(code_N, minlength=len(counts_K)).numpy()
        self._ones_L += tokens_NL.sum(0).numpy()
        self._num_tokens += len(tokens_NL)

    def compute(self) -> dict[str, float]:
        """Figures over all tokens counted.

        Returns:
            code_usage: share of all sub-token codes seen at least once, mean over sub-tokens, 0 to 1.
            code_perplexity: 2 to the entropy of a sub-token's codes, mean over sub-tokens.
            bit_entropy: mean entropy of a single bit, 0 to 1; the least of them is bit_entropy_min.
            sub_token_bits: width of a sub-token; tokens: how many were counted.
        """
        num_tokens = max(1, self._num_tokens)
        entropy_S = np.array([_entropy(counts_K / num_tokens) for counts_K in self._counts_SK])
        one_frequency_L = self._ones_L / num_tokens
        bit_entropy_L = np.array([_entropy(np.array([p, 1 - p])) for p in one_frequency_L])
        return {
            "code_usage": float((self._counts_SK > 0).mean()),
            "code_perplexity": float((2**entropy_S).mean()),
            "bit_entropy": float(bit_entropy_L.mean()),
            "bit_entropy_min": float(bit_entropy_L.min()),
            "sub_token_bits": float(self.sub_bits),
            "tokens": float(self._num_tokens),
        }

    def bit_entropies(self) -> list[float]:
        """Entropy of each bit, least significant first, in bits."""
        return [_entropy(np.array([p, 1 - p])) for p in self._ones_L / max(1, self._num_tokens)]


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())
