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

from bsq_ray.training.checkpoints.host_snapshot import Files, as_safetensors, inside, pickled
from bsq_ray.training.ema import EMA
from bsq_ray.training.engines.engine import Engine
from bsq_ray.training.worker_context import Worker


@dataclass
class State:
    """This worker's part of the run's state."""

    engines: dict[str, Engine]
    ema: EMA | None
    worker: Worker

    def snapshot(self) -> Files:
        """Copies of everything, as files of a checkpoint; every worker calls it."""
        files: Files = {}
        for name, engine in self.engines.items():
            files |= inside(name, engine.snapshot())
        generators = {"cpu": torch.get_rng_state()}
        if self.worker.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state()
        files[f"rng-{self.worker.rank}.pt"] = pickled(generators)
        if self.worker.first and self.ema is not None:
            files["ema.safetensors"] = as_safetensors(self.ema.state_dict())
        return files

    def convert(self, folder: Path) -> None:
        """Makes the files of a checkpoint loadable for another number of workers; one worker of a machine calls it."""
        for name, engine in self.engines.items():
            engine.convert(folder / name)

    def restore(self, folder: Path, same_world: bool) -> None:
        """Puts back what lies in a folder; every worker calls it.

        Args:
            same_world: as many workers wrote it; otherwise it was converted.
        """
        for name, engine in self.engines.items():
            engine.load(folder / name, same_world)
        if self.ema is not None:
            self.ema.load_state_dict(safetensors.torch.load_file(folder / "ema.safetensors"))
        if same_world:
            generators = torch.load(folder / f"rng-{self.worker.rank}.pt", weights_only=True)
            torch.set_rng_state(generators["cpu"])
            if self.worker.device.type == "cuda" and "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"])
