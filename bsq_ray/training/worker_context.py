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


class Wish(IntEnum):
    """What a run is asked to do after its step; the greater one counts."""

    GO_ON = 0
    # Save and end, because others will go on: more workers, fewer, or on other machines.
    MAKE_ROOM = 1
    # Save, write the model folder and end.
    STOP = 2


class Reporter(Protocol):
    """Where a run tells what it does, and hears what it should do. Only rank 0's is used."""

    def record(self, record: dict[str, Any]) -> None:
        """One record of the log: `kind` says what it is."""

    def wish(self) -> Wish:
        """What the run was asked to do."""


@dataclass
class Worker:
    """A process of the run.

    Attributes:
        rank, world: its number and how many there are.
        device: where it computes.
        executor: who reads its data.
        reporter: see `Reporter`.
    """

    rank: int
    world: int
    device: torch.device
    executor: Executor
    reporter: Reporter

    @property
    def first(self) -> bool:
        """Whether it is the one that writes for all."""
        return self.rank == 0

    def greatest(self, values: Sequence[float]) -> list[float]:
        """The greatest of each value over all workers."""
        if self.world == 1:
            return list(values)
        joined = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(joined, dist.ReduceOp.MAX)
        return [float(value) for value in joined.tolist()]

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over all workers."""
        if self.world == 1:
            return list(values)
        joined = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(joined)
        return [float(value) / self.world for value in joined.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all workers."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def node_folder(self) -> Iterator[tuple[Path, int]]:
        """A temporary folder shared by the workers of a machine, and the rank of the one that is to fill it."""
        with tempfile.TemporaryDirectory() as own:
            # Names of hosts need not differ, and containers of one host need not see each other's files.
            everyone = [Path(folder) for folder in self.gather(own)]
            filler = next(rank for rank, folder in enumerate(everyone) if folder.exists())
            yield everyone[filler], filler
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
    mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(mine)
    return mine


def autocast_precision(precision: Literal["bf16", "fp32", "auto"], device: torch.device) -> Literal["bf16", "fp32"]:
    """What "auto" means on this hardware: bf16 where it has instructions for it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
