"""Batch-invariant inference: each row's result is bit-identical to the result of a batch with this row alone.

Matrix products may sum in another order when the batch size changes. Then values near zero change sign, which flips
tokens, or pixels round differently. The order depends on shapes, threads and hardware, not on the values. Each replica
therefore calibrates at startup: it finds the batch sizes that reproduce single-row results, and uses only those.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

RowFunction = Callable[..., Tensor]


class BatchSizes(NamedTuple):
    """Verified batch sizes, see the attributes of `BatchInvariantRunner`."""

    sizes: list[int]
    per_core_sizes: list[int]


class BatchInvariantRunner:
    """Runs a row-wise function in batches whose results are bit-identical to single-row results.

        rows ─▶ equal number of rows per core, in safe batches on one core each
             └▶ remainder: fewer rows than cores, in safe batches on all cores together

    Cores with separate rows do not synchronize in every layer, unlike cores that share a forward pass.

    Args:
        run: maps one or more tensors (B, …) to a tensor (B, …).
        rows: example inputs; the number of rows is the largest batch size to calibrate.
        num_cores: number of CPU cores that can compute rows separately; 1 on a GPU.
        timeout_s: calibration stops if the next size would exceed this time. Large models are as fast without batches
            on a CPU.
        known_sizes: sizes that were verified before for a function of the same shapes; None calibrates.

    Attributes:
        sizes: safe batch sizes on all cores together: powers of two, descending to 1.
        per_core_sizes: safe batch sizes on a single core; empty if a single core does not reproduce all cores' results.
    """

    def __init__(
        self,
        run: RowFunction,
        *rows: Tensor,
        num_cores: int = 1,
        timeout_s: float = 10.0,
        known_sizes: BatchSizes | None = None,
    ) -> None:
        self._run, self._num_cores = run, num_cores
        self._core_threads = _core_threads(num_cores)
        self.sizes, self.per_core_sizes = known_sizes or self._calibrate(rows, timeout_s)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Verified batch sizes, for another runner of a function of the same shapes."""
        return BatchSizes(self.sizes, self.per_core_sizes)

    def _calibrate(self, rows: tuple[Tensor, ...], timeout_s: float) -> BatchSizes:
        calibration, max_size = _Calibration(self._run, rows), len(rows[0])
        sizes = [size for size in calibration.find_safe_sizes(self._run, max_size, timeout_s) if size > 1] + [1]
        per_core_sizes: list[int] = []
        if 1 < self._num_cores <= max_size:
            max_per_core = max_size // self._num_cores
            per_core_sizes = calibration.find_safe_sizes(self._run_on_one_core, max_per_core, timeout_s / 4)
        return BatchSizes(sizes, per_core_sizes if 1 in per_core_sizes else [])

    def __call__(self, *rows: Tensor) -> Tensor:
        """Return the results of all rows, in input order."""
        num_rows = len(rows[0])
        rows_per_core = num_rows // self._num_cores if self.per_core_sizes else 0
        futures, start = [], 0
        if rows_per_core:
            for _ in range(self._num_cores):
                core_rows = _slice_rows(rows, slice(start, start + rows_per_core))
                futures.append(self._core_threads.submit(run_in_chunks, self._run, core_rows, self.per_core_sizes))
                start += rows_per_core
        # The remainder uses all cores, so it waits for the single-core batches.
        results = [future.result() for future in futures]
        if start < num_rows:
            remainder = _slice_rows(rows, slice(start, None))
            results.append(run_in_chunks(self._run, remainder, self.sizes))
        return torch.cat(results)

    def _run_on_one_core(self, *rows: Tensor) -> Tensor:
        return self._core_threads.submit(self._run, *rows).result()


# The models of a process compute on the same cores.
@cache
def _core_threads(num_cores: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores, "core", torch.set_num_threads, (1,))


class _Calibration:
    """Compares batched results with single-row results on all cores."""

    def __init__(self, run: RowFunction, rows: tuple[Tensor, ...]) -> None:
        self._run, self._rows = run, rows
        self._single_row_results: list[Tensor] = []
        # Warm up: the first call is slower, and must not count toward the timeout.
        run(*_slice_rows(rows, slice(1)))

    def find_safe_sizes(self, run: RowFunction, max_size: int, timeout_s: float) -> list[int]:
        """Return the powers of two, descending, at which `run` reproduces the single-row results bit by bit."""
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
    """Yield slices that cover `num_rows` rows, each as long as one of `sizes` (descending to 1)."""
    start = 0
    for size in sizes:
        while num_rows - start >= size:
            yield slice(start, start + size)
            start += size


def run_in_chunks(run: RowFunction, rows: tuple[Tensor, ...], sizes: list[int]) -> Tensor:
    """Return the results of all rows, computed in batches of these sizes (descending to 1)."""
    return torch.cat([run(*_slice_rows(rows, chunk)) for chunk in chunk_slices(len(rows[0]), sizes)])
