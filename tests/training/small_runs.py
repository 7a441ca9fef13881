"""Trainings so small that dozens of them fit in a test run, and what listens to them."""

import torch

from bsq_ray.config import load_config
from bsq_ray.training.run_spec import Job
from bsq_ray.training.trainer import run
from bsq_ray.training.worker_context import Wish, Worker

STEPS = 4
PRESET = "imagenet128-bsq18"
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
    "data.lanes=4",
    "data.flip=true",
    "data.crop_scale=[1.0, 1.5]",
    "data.shuffle_window=32",
    "training.batch_size=16",
    f"training.steps={STEPS}",
    "training.schedule.warmup_steps=0",
    "training.optimizer.learning_rate_per_256=0.016",
    "training.ema_decay=0.9",
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

    def wish(self):
        return Wish.STOP if self.last is not None and self.steps + 1 >= self.last else Wish.GO_ON

    @property
    def steps(self):
        return max((record["step"] for record in self.records), default=0)

    @property
    def training(self):
        return [record for record in self.records if record["kind"] == "training"]


def small_job(shards, out, overrides=(), **settings):
    return Job(load_config(PRESET, [*SMALL, *overrides]), shards, str(out), **settings)


def in_this_process(listener):
    return Worker(0, 1, torch.device("cpu"), "local", listener)


def train_several(rank, world, shards, out, runs, last=None):
    """Trains each of `runs`, name → overrides, one after the other; returns the records of each one's steps.

    Those in `last` are asked to stop after that step.
    """
    losses = {}
    for name, overrides in runs.items():
        listener = Listener((last or {}).get(name))
        job = small_job(shards, f"{out}/{name}", overrides)
        run(job, Worker(rank, world, torch.device("cpu"), "local", listener))
        losses[name] = listener.training
    return losses
