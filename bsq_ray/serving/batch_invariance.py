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

RowFunction = Callable[..., Tensor]


class BatchInvariantRunner:
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

    def __init__(self, run: RowFunction, *rows: Tensor, num_cores: int = 1, timeout_s: float = 10.0) -> None:
        self._run, self._num_cores = run, num_cores
        self._core_threads = ThreadPoolExecutor(num_cores, "core", torch.set_num_threads, (1,))
        calibration = _Calibration(run, rows)
        max_size = len(rows[0])
        self.sizes = [size for size in calibration.safe_sizes(run, max_size, timeout_s) if size > 1] + [1]
        self.per_core_sizes: list[int] = []
        if 1 < num_cores <= max_size:
            per_core_sizes = calibration.safe_sizes(self._run_on_one_core, max_size // num_cores, timeout_s / 4)
            self.per_core_sizes = per_core_sizes if 1 in per_core_sizes else []

    def __call__(self, *rows: Tensor) -> Tensor:
        """Results of all rows."""
        rows_per_core = len(rows[0]) // self._num_cores if self.per_core_sizes else 0
        core_slices = [
            slice(n * rows_per_core, (n + 1) * rows_per_core) for n in range(self._num_cores if rows_per_core else 0)
        ]
        run_on_one_core = partial(run_in_chunks, self._run, sizes=self.per_core_sizes)
        results = list(self._core_threads.map(lambda part: run_on_one_core(_slice_rows(rows, part)), core_slices))
        remainder = _slice_rows(rows, slice(rows_per_core * self._num_cores, None))
        return torch.cat([*results, run_in_chunks(self._run, remainder, self.sizes)] if len(remainder[0]) else results)

    def _run_on_one_core(self, *rows: Tensor) -> Tensor:
        return self._core_threads.submit(self._run, *rows).result()


class _Calibration:
    """Compares batches with rows that are computed alone, by all cores."""

    def __init__(self, run: RowFunction, rows: tuple[Tensor, ...]) -> None:
        self._run, self._rows = run, rows
        self._single_row_results: list[Tensor] = []
        run(*_slice_rows(rows, slice(1)))

    def safe_sizes(self, run: RowFunction, max_size: int, timeout_s: float) -> list[int]:
        """Powers of two, descending, at which `run` gives each row what it gets alone."""
        start_time = time.perf_counter()
        sizes, size = [], 1
        while size <= max_size and (size == 1 or 2 * (time.perf_counter() - start_time) <= timeout_s):
            for n in range(len(self._single_row_results), size):
                self._single_row_results.append(self._run(*_slice_rows(self._rows, slice(n, n + 1))))
            if torch.equal(run(*_slice_rows(self._rows, slice(size))), torch.cat(self._single_row_results[:size])):
                sizes.append(size)
            size *= 2
        return sizes[::-1]


def _slice_rows(rows: tuple[Tensor, ...], row_slice: slice) -> tuple[Tensor, ...]:
    return tuple(tensor[row_slice] for tensor in rows)


def chunk_slices(num_rows: int, sizes: list[int]) -> Iterator[slice]:
    """Slices of a batch of `count` rows, each of one of the sizes (descending, the last one 1)."""
    start = 0
    for size in sizes:
        while num_rows - start >= size:
            yield slice(start, start + size)
            start += size


def run_in_chunks(run: RowFunction, rows: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    """Results of all rows, computed in batches of the given sizes only."""
    return torch.cat([run(*_slice_rows(rows, piece)) for piece in chunk_slices(len(rows[0]), sizes)])
