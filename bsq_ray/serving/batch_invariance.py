"""Batches that change no bit of any answer.

Matrix products may add up in another order when a batch has another size, and then tokens near zero flip and pixels
round differently. Which order is taken depends on shapes, threads and the machine, not on the values. So each replica
tries on its own machine which sizes of batches give the bits of single rows, and uses only those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

Run = Callable[..., Tensor]


class ExactBatches:
    """A function of rows, computed in batches that give each row what it gets alone.

        rows ─▶ equal shares, one for each core ─▶ exact batches, each core by itself
             └▶ the few that are left           ─▶ exact batches, all cores together

    Cores with rows of their own do not wait for each other, as they do in every layer of a pass that they share.

    Args:
        run: one or more tensors of rows (B, …) to results (B, …).
        rows: examples; their number is the largest size that is tried.
        cores: threads that compute a row which is alone; 1 on a GPU.
        seconds: trying ends when the next size would take longer; large models gain nothing by batches on a CPU.

    Attributes:
        sizes: of batches that all cores compute together: 1 and powers of two, descending.
        core_sizes: of batches that a core computes by itself; empty if that does not give the same bits.
    """

    def __init__(self, run: Run, *rows: Tensor, cores: int = 1, seconds: float = 10.0) -> None:
        self._run, self._cores = run, cores
        self._threads = ThreadPoolExecutor(cores, "core", torch.set_num_threads, (1,))
        trial = _Trial(run, rows)
        largest = len(rows[0])
        self.sizes = [size for size in trial.sizes(run, largest, seconds) if size > 1] + [1]
        self.core_sizes: list[int] = []
        if 1 < cores <= largest:
            found = trial.sizes(self._by_one_core, largest // cores, seconds / 4)
            self.core_sizes = found if 1 in found else []

    def __call__(self, *rows: Tensor) -> Tensor:
        """Results of all rows."""
        share = len(rows[0]) // self._cores if self.core_sizes else 0
        shares = [slice(n * share, (n + 1) * share) for n in range(self._cores if share else 0)]
        by_one_core = partial(in_pieces, self._run, sizes=self.core_sizes)
        results = list(self._threads.map(lambda part: by_one_core(_cut(rows, part)), shares))
        rest = _cut(rows, slice(share * self._cores, None))
        return torch.cat([*results, in_pieces(self._run, rest, self.sizes)] if len(rest[0]) else results)

    def _by_one_core(self, *rows: Tensor) -> Tensor:
        return self._threads.submit(self._run, *rows).result()


class _Trial:
    """Compares batches with rows that are computed alone, by all cores."""

    def __init__(self, run: Run, rows: tuple[Tensor, ...]) -> None:
        self._run, self._rows = run, rows
        self._alone: list[Tensor] = []
        run(*_cut(rows, slice(1)))

    def sizes(self, run: Run, largest: int, seconds: float) -> list[int]:
        """Powers of two, descending, at which `run` gives each row what it gets alone."""
        began = time.perf_counter()
        found, size = [], 1
        while size <= largest and (size == 1 or 2 * (time.perf_counter() - began) <= seconds):
            for n in range(len(self._alone), size):
                self._alone.append(self._run(*_cut(self._rows, slice(n, n + 1))))
            if torch.equal(run(*_cut(self._rows, slice(size))), torch.cat(self._alone[:size])):
                found.append(size)
            size *= 2
        return found[::-1]


def _cut(rows: tuple[Tensor, ...], part: slice) -> tuple[Tensor, ...]:
    return tuple(tensor[part] for tensor in rows)


def pieces(count: int, sizes: list[int]) -> Iterator[slice]:
    """Slices of a batch of `count` rows, each of one of the sizes (descending, the last one 1)."""
    start = 0
    for size in sizes:
        while count - start >= size:
            yield slice(start, start + size)
            start += size


def in_pieces(run: Run, rows: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    """Results of all rows, computed in batches of the given sizes only."""
    return torch.cat([run(*_cut(rows, piece)) for piece in pieces(len(rows[0]), sizes)])
