"""Key-value cache of one attention layer, for tokens that arrive in parts.

Shape suffixes: B batch, H heads, N new tokens, M tokens so far including the new ones, E width of one head.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of the tokens so far. The memory is allocated at the first `extend`.

    Args:
        capacity: maximum number of tokens.

    Attributes:
        length: number of tokens so far; set it to 0 to reuse the memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._key_values: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BHNE: Tensor, v_BHNE: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them so far, (B, H, M, E) each."""
        if self._key_values is None:
            batch, heads, _, width = k_BHNE.shape
            shape = (batch, heads, self.capacity, width)
            self._key_values = k_BHNE.new_empty(shape), v_BHNE.new_empty(shape)
        start, self.length = self.length, self.length + k_BHNE.shape[2]
        assert self.length <= self.capacity
        for buffer, new in zip(self._key_values, (k_BHNE, v_BHNE), strict=True):
            buffer[:, :, start : self.length] = new
        return self._key_values[0][:, :, : self.length], self._key_values[1][:, :, : self.length]
