"""Batches that change no bit of any answer.

Matrix products may add up in another order when a batch has another size, and then tokens near zero flip and pixels
round differently. Which order is taken depends on shapes, threads and the machine, not on the values. So each replica
tries on its own machine which sizes of batches give the bits of single images, and uses only those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def exact_sizes(run: Callable[[Tensor], Tensor], rows: Tensor, seconds: float = 10.0) -> list[int]:
    """Sizes of batches (1 and powers of two, descending) that give each row what it gets alone.

    Args:
        run: rows (B, …) to results (B, …).
        rows: examples; their number is the largest size that is tried.
        seconds: trying ends when the next size would take longer; large models gain nothing by batches on a CPU.
    """
    began = time.perf_counter()
    run(rows[:1])
    alone: list[Tensor] = []
    sizes, size = [1], 2
    while size <= len(rows):
        spent = time.perf_counter() - began
        if alone and spent * 2 > seconds:
            break
        alone += [run(rows[n : n + 1]) for n in range(len(alone), size)]
        if torch.equal(run(rows[:size]), torch.cat(alone)):
            sizes.append(size)
        size *= 2
    return sizes[::-1]


def pieces(count: int, sizes: list[int]) -> Iterator[slice]:
    """Slices of a batch of `count` rows, each of one of the sizes (descending, the last one 1)."""
    start = 0
    for size in sizes:
        while count - start >= size:
            yield slice(start, start + size)
            start += size


def in_pieces(run: Callable[[Tensor], Tensor], rows: Tensor, sizes: list[int]) -> Tensor:
    """Results of all rows, computed in batches of the given sizes only."""
    return torch.cat([run(rows[piece]) for piece in pieces(len(rows), sizes)])
