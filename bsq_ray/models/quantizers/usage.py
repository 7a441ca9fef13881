"""Code usage: the fraction of codes that are used, without materializing all 2^L codes.

Tokens are split into sub-tokens of at most 18 bits, and the codes of each sub-token are counted. At 18 bits or fewer
the sub-token is the whole token, and the metric equals the paper's code usage.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bsq_ray.models.quantizers.bits import bits_to_integers

_MAX_SUB_BITS = 18


class CodeUsage:
    """Accumulates statistics of code usage over batches.

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
        """Add the tokens of a batch, bits (…, L) of 0 and 1."""
        tokens_NL = bits_BNL.detach().cpu().reshape(-1, self.bits)
        for counts_K, codes_N in zip(
            self._counts_SK, bits_to_integers(tokens_NL, self.sub_bits).unbind(-1), strict=True
        ):
            counts_K += torch.bincount(codes_N, minlength=len(counts_K)).numpy()
        self._ones_L += tokens_NL.sum(0).numpy()
        self._num_tokens += len(tokens_NL)

    def counts(self) -> Tensor:
        """Return all counts as one int64 tensor; those of several workers can be added."""
        parts = (self._counts_SK.reshape(-1), self._ones_L, np.array([self._num_tokens]))
        return torch.from_numpy(np.concatenate(parts))

    def set_counts(self, counts: Tensor) -> None:
        """Replace all counts with the sum of several results of `counts`."""
        num_codes = self._counts_SK.size
        parts = np.split(counts.cpu().numpy(), [num_codes, num_codes + self.bits])
        self._counts_SK, self._ones_L = parts[0].reshape(self._counts_SK.shape), parts[1]
        self._num_tokens = int(parts[2][0])

    def compute(self) -> dict[str, float]:
        """Return metrics over all counted tokens.

        Returns:
            code_usage: fraction of the sub-token codes that are used, mean over sub-tokens, 0 to 1.
            code_perplexity: 2 to the entropy of the codes of a sub-token, mean over sub-tokens.
            bit_entropy: mean entropy per bit, 0 to 1.
            bit_entropy_min: smallest entropy of any bit, 0 to 1.
            sub_token_bits: bits of a sub-token.
            tokens: number of counted tokens.
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
        """Return the entropy of each bit, least significant first, in bits."""
        return [_entropy(np.array([p, 1 - p])) for p in self._ones_L / max(1, self._num_tokens)]


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())
