"""Key-value cache of one attention layer, for incremental decoding.

Shape suffixes: B batch, H heads, N new tokens, M cached tokens including the new ones, E width of one head.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of all previous tokens. The first `extend` allocates the memory.

    Args:
        capacity: maximum number of tokens.

    Attributes:
        length: number of cached tokens; set to 0 to empty the cache without releasing its memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._key_values: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BHNE: Tensor, v_BHNE: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all cached ones, (B, H, M, E) each."""
        if self._key_values is None:
            batch_size, heads, _, head_dim = k_BHNE.shape
            shape = (batch_size, heads, self.capacity, head_dim)
            self._key_values = k_BHNE.new_empty(shape), v_BHNE.new_empty(shape)
        start, self.length = self.length, self.length + k_BHNE.shape[2]
        assert self.length <= self.capacity
        for buffer, new_BHNE in zip(self._key_values, (k_BHNE, v_BHNE), strict=True):
            buffer[:, :, start : self.length] = new_BHNE
        return self._key_values[0][:, :, : self.length], self._key_values[1][:, :, : self.length]
