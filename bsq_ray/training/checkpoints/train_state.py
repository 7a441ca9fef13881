"""What a run changes as it goes on: engines, averaged weights, random generators. It can be copied and put back.

generator/… discriminator/…   what each engine keeps, every worker its own part
ema.safetensors               averaged weights, from the first worker
rng-0.pt …                    random generators, one for each worker
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from bsq_ray.training.checkpoints.host_snapshot import FileWriters, safetensors_writer, torch_save_writer, with_prefix
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import Engine
from bsq_ray.training.worker_context import WorkerContext


@dataclass
class TrainState:
    """This worker's part of the run's state."""

    engines: dict[str, Engine]
    ema: EMA | None
    worker: WorkerContext

    def snapshot(self) -> FileWriters:
        """Copies of everything, as files of a checkpoint; every worker calls it."""
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

    def to_universal(self, folder: Path) -> None:
        """Makes the files of a checkpoint loadable for another number of workers; one worker of a machine calls it."""
        for name, engine in self.engines.items():
            engine.to_universal(folder / name)

    def restore(self, folder: Path, same_world_size: bool) -> None:
        """Puts back what lies in a folder; every worker calls it.

        Args:
            same_world: as many workers wrote it; otherwise it was converted.
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
