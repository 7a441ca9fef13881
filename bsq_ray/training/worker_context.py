"""One worker of a run: who it is among the others, and what all of them must agree on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from bsq_ray.data.stream import Executor

# What a worker computes on; "auto" takes a GPU where there is one.
Device = Literal["auto", "cpu", "gpu"]


class ControlSignal(IntEnum):
    """What a run is asked to do after its step; the greater one counts."""

    CONTINUE = 0
    # Save and end, because others will go on: more workers, fewer, or on other machines.
    RESIZE = 1
    # Save, write the model folder and end.
    STOP = 2


class Reporter(Protocol):
    """Where a run tells what it does, and hears what it should do. Only rank 0's is used."""

    def record(self, record: dict[str, Any]) -> None:
        """One record of the log: `kind` says what it is."""

    def control_signal(self) -> ControlSignal:
        """What the run was asked to do."""


@dataclass
class WorkerContext:
    """A process of the run.

    Attributes:
        rank, world: its number and how many there are.
        device: where it computes.
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
        """Whether it is the one that writes for all."""
        return self.rank == 0

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The greatest of each value over all workers."""
        if self.world_size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return [float(value) for value in reduced.tolist()]

    def all_reduce_mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over all workers."""
        if self.world_size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return [float(value) / self.world_size for value in reduced.tolist()]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everybody's value, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all workers."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def node_local_dir(self) -> Iterator[tuple[Path, int]]:
        """A temporary folder shared by the workers of a machine, and the rank of the one that is to fill it."""
        with tempfile.TemporaryDirectory() as own_dir:
            # Names of hosts need not differ, and containers of one host need not see each other's files.
            dirs_by_rank = [Path(folder) for folder in self.all_gather_object(own_dir)]
            owner_rank = next(rank for rank, folder in enumerate(dirs_by_rank) if folder.exists())
            yield dirs_by_rank[owner_rank], owner_rank
            self.barrier()


def local_device(device: Device) -> torch.device:
    """This process's GPU, or the CPU.

    Raises:
        ValueError: a GPU is asked for and PyTorch sees none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device gpu needs a GPU, and PyTorch sees none here; give --device cpu")
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(gpu)
    return gpu


def autocast_precision(precision: Literal["bf16", "fp32", "auto"], device: torch.device) -> Literal["bf16", "fp32"]:
    """What "auto" means on this hardware: bf16 where it has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    has_native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_native_bf16 else "fp32"
