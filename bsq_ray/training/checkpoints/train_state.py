"""State that training changes: engines, averaged weights and random generators.

generator/… discriminator/…   state of each engine, one part per worker; frozen.safetensors: parameters not trained
ema.safetensors               averaged weights, written by rank 0
rng-0.pt …                    random generators, one file per worker
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from bsq_ray.training.checkpoints.host_snapshot import FileWriters, safetensors_writer, torch_save_writer, with_prefix
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import Engine
from bsq_ray.training.worker_context import WorkerContext

_RNG_FILE = re.compile(r"rng-(\d+)\.pt")


@dataclass
class TrainState:
    """This worker's part of the training state."""

    engines: dict[str, Engine]
    ema: EMA | None
    worker: WorkerContext

    def snapshot(self) -> FileWriters:
        """Copy the state to host memory, as writers of checkpoint files; collective."""
        files: FileWriters = {}
        for name, engine in self.engines.items():
            files |= with_prefix(name, engine.snapshot())
        rng_states = {"cpu": torch.get_rng_state()}
        if self.worker.device.type == "cuda":
            rng_states["cuda"] = torch.cuda.get_rng_state()
        files[f"rng-{self.worker.rank}.pt"] = torch_save_writer(rng_states)
        if self.worker.is_main and self.ema is not None:
            files["ema.safetensors"] = safetensors_writer(self.ema.state_dict())
        return files

    def loads_file(self, name: str, ranks: Collection[int], old_world_size: int) -> bool:
        """Return True if the workers of these ranks load this file of a checkpoint of `old_world_size` workers."""
        if match := _RNG_FILE.fullmatch(name):
            return old_world_size == self.worker.world_size and int(match[1]) in ranks
        engine_name, _, engine_file = name.partition("/")
        engine = self.engines.get(engine_name)
        return engine is None or engine.loads_file(engine_file, ranks, old_world_size)

    def repartition(self, folder: Path, ranks: Collection[int], old_world_size: int) -> None:
        """Convert a checkpoint of another number of workers for those of these ranks; one worker of a node calls it."""
        for name, engine in self.engines.items():
            engine.repartition(folder / name, ranks, old_world_size)

    def restore(self, folder: Path, same_world_size: bool) -> None:
        """Load a checkpoint from a local folder; collective.

        Random generators are restored only for the same number of workers.

        Args:
            same_world_size: the checkpoint was written by as many workers; otherwise `repartition` has run.
        """
        for name, engine in self.engines.items():
            engine.load(folder / name, same_world_size)
        if self.ema is not None:
            self.ema.load_state_dict(safetensors.torch.load_file(folder / "ema.safetensors"))
        if same_world_size:
            rng_states = torch.load(folder / f"rng-{self.worker.rank}.pt", weights_only=True)
            torch.set_rng_state(rng_states["cpu"])
            if self.worker.device.type == "cuda" and "cuda" in rng_states:
                torch.cuda.set_rng_state(rng_states["cuda"])
