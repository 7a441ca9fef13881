"""Batches that do not change a single bit of any result.

Matrix products may sum in another order when the batch size changes. Then values near zero change sign and tokens flip,
or pixels round differently. The order depends on shapes, threads and hardware, not on the values. So each replica
measures on its own hardware which batch sizes reproduce the bits of single rows, and uses only those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

RowFunction = Callable[..., Tensor]


class BatchInvariantRunner:
    """Computes a function of rows in batches that give each row the same bits as when it is computed alone.

        rows ─▶ full-core part: equal shares, each in safe batches by one core
             └▶ remainder: fewer rows than cores, in safe batches by all cores

    Cores that have rows of their own do not synchronize in every layer, as they do when they share a pass.

    Args:
        run: maps one or more tensors (B, …) to a tensor (B, …).
        rows: example inputs; their number of rows is the largest batch size that is tried.
        num_cores: cores that can compute rows separately; 1 on a GPU.
        timeout_s: calibration stops when the next size would exceed this time; large models gain nothing from batches
            on a CPU.

    Attributes:
        sizes: safe batch sizes of all cores together, powers of two, descending, the last one 1.
        per_core_sizes: safe batch sizes of a single core; empty if one core gives other bits than all together.
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
        """Return the results of all rows, in their order."""
        num_rows = len(rows[0])
        rows_per_core = num_rows // self._num_cores if self.per_core_sizes else 0
        futures, start = [], 0
        if rows_per_core:
            for _ in range(self._num_cores):
                share = _slice_rows(rows, slice(start, start + rows_per_core))
                futures.append(self._core_threads.submit(run_in_chunks, self._run, share, self.per_core_sizes))
                start += rows_per_core
        # The remainder uses all cores, so it starts when they have finished their shares.
        results = [future.result() for future in futures]
        if start < num_rows:
            remainder = _slice_rows(rows, slice(start, None))
            results.append(run_in_chunks(self._run, remainder, self.sizes))
        return torch.cat(results)

    def _run_on_one_core(self, *rows: Tensor) -> Tensor:
        return self._core_threads.submit(self._run, *rows).result()


class _Calibration:
    """Compares batches with rows that all cores compute one by one."""

    def __init__(self, run: RowFunction, rows: tuple[Tensor, ...]) -> None:
        self._run, self._rows = run, rows
        self._single_row_results: list[Tensor] = []
        # The first call is slower than the others, so it is not timed.
        run(*_slice_rows(rows, slice(1)))

    def safe_sizes(self, run: RowFunction, max_size: int, timeout_s: float) -> list[int]:
        """Return the powers of two, descending, at which `run` gives each row the bits it gets alone."""
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
    """Yield slices that cover `num_rows` rows, each of one of the sizes (descending, the last one 1)."""
    start = 0
    for size in sizes:
        while num_rows - start >= size:
            yield slice(start, start + size)
            start += size


def run_in_chunks(run: RowFunction, rows: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    """Return the results of all rows, computed in batches of the given sizes only."""
    return torch.cat([run(*_slice_rows(rows, chunk)) for chunk in chunk_slices(len(rows[0]), sizes)])
