"""Trainings so small that dozens of them fit in a test run, and what listens to them."""

import torch

from bsq_ray.config import load_config
from bsq_ray.training.job import Job
from bsq_ray.training.loop import run
from bsq_ray.training.worker import Worker

STEPS = 4
SMALL = [
    "model.image_size=16",
    "model.patch_size=4",
    "model.encoder.width=16",
    "model.encoder.layers=1",
    "model.encoder.heads=2",
    "model.decoder.width=16",
    "model.decoder.layers=1",
    "model.decoder.heads=2",
    "model.decoder.head_width=32",
    "model.quantizer.entropy.across_workers=true",
    "loss.perceptual_weight=0",
    "loss.adversarial.channel_base=128",
    "loss.adversarial.channel_max=8",
    "loss.adversarial.r1_every=2",
    "data.shuffle_window=32",
    "training.batch_size=16",
    f"training.steps={STEPS}",
    "training.schedule.warmup_steps=0",
    "training.engine.precision=fp32",
    "training.log_every=1",
    "training.evaluate_batches=1",
]


class Listener:
    """Keeps a run's records; asks it to stop after a step."""

    def __init__(self, last=None):
        self.records = []
        self.last = last

    def record(self, record):
        self.records.append(record)

    def stop_requested(self):
        return self.last is not None and any(r["step"] >= self.last for r in self.records)


def train_several(rank, world, shards, out, runs):
    """Trains each of `runs`, name → overrides, one after the other; returns the losses of each step."""
    losses = {}
    for name, overrides in runs.items():
        listener = Listener()
        job = Job(load_config("demo", [*SMALL, *overrides]), shards, f"{out}/{name}")
        run(job, Worker(rank, world, torch.device("cpu"), "local", listener))
        losses[name] = [record for record in listener.records if record["kind"] == "training"]
    return losses
