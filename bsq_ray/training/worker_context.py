"""One process of a run: its rank, collective operations, reporter and device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from bsq_ray.data.stream import Executor
from bsq_ray.runtime._torch_internals import has_native_bf16

# Device of each worker; "auto" uses a GPU if there is one.
Device = Literal["auto", "cpu", "gpu"]
# Receives one record of a run; its key "kind" gives the type of the record.
RecordSink = Callable[[dict[str, Any]], None]


class ControlSignal(IntEnum):
    """Signal that a run obeys after its current step; the greatest value over all ranks counts."""

    CONTINUE = 0
    # Save a checkpoint and exit: the run restarts with another number of workers, or on other nodes.
    RESIZE = 1
    # Save a checkpoint and the model folder and exit.
    STOP = 2


class Reporter(Protocol):
    """Sink for run records and source of control signals; only that of rank 0 is used."""

    def record(self, record: dict[str, Any]) -> None:
        """Report one record of the run."""

    def control_signal(self) -> ControlSignal:
        """Return the newest control signal."""


@dataclass(frozen=True)
class NodeFolder:
    """A local folder that the workers of a node share.

    Attributes:
        path: the folder.
        ranks: ranks of the workers that share it, ascending.
    """

    path: Path
    ranks: list[int]

    @property
    def owner_rank(self) -> int:
        """Rank of the worker that fills the folder."""
        return self.ranks[0]


@dataclass
class WorkerContext:
    """One process of the run.

    Attributes:
        rank, world_size: index of the process and number of processes.
        device: device it computes on.
        executor: who reads its data.
        reporter: see `Reporter`.
    """

    rank: int
    world_size: int
    device: torch.device
    executor: Executor
    reporter: Reporter

    @property
    def is_main(self) -> bool:
        """Return True on rank 0, which writes files for all."""
        return self.rank == 0

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """Return the maximum of each value over all workers."""
        if self.world_size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return [float(value) for value in reduced.tolist()]

    def all_reduce_mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each value over all workers."""
        if self.world_size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return [float(value) / self.world_size for value in reduced.tolist()]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the value of every worker, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def node_local_dir(self) -> Iterator[NodeFolder]:
        """Yield a temporary folder shared by the workers of a node."""
        with tempfile.TemporaryDirectory() as own_dir:
            # Not by host name: two hosts can have the same, and containers of one host may not share files.
            dirs_by_rank = [Path(folder) for folder in self.all_gather_object(own_dir)]
            ranks = [rank for rank, folder in enumerate(dirs_by_rank) if folder.exists()]
            yield NodeFolder(dirs_by_rank[ranks[0]], ranks)
            self.barrier()


def local_device(device: Device) -> torch.device:
    """Return this process's GPU, or the CPU.

    Raises:
        ValueError: a GPU is required and PyTorch finds none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device gpu requires a GPU, and PyTorch finds none on this node; give --device cpu")
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(gpu)
    return gpu


def autocast_precision(precision: Literal["bf16", "fp32", "auto"], device: torch.device) -> Literal["bf16", "fp32"]:
    """Resolve "auto" to bf16 if the hardware has instructions for it, else to fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if has_native_bf16() else "fp32"
