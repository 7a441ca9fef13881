"""Small runs for tests, and a reporter that records them."""

import torch

from bsq_ray.config import load_config
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import ControlSignal, WorkerContext

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
    "model.decoder.head_hidden_dim=32",
    "model.quantizer.entropy.across_workers=true",
    "loss.perceptual_weight=0",
    "loss.adversarial.channel_base=128",
    "loss.adversarial.channel_max=8",
    "loss.adversarial.r1_every=2",
    "data.interleave=4",
    "data.random_flip=true",
    "data.resize_range=[1.0, 1.5]",
    "data.shuffle_block_size=32",
    "training.batch_size=16",
    f"training.steps={STEPS}",
    "training.schedule.warmup_steps=0",
    "training.optimizer.base_learning_rate=0.016",
    "training.ema_decay=0.9",
    "training.engine.precision=fp32",
    "training.log_every=1",
    "training.eval_samples=16",
]


class RecordingReporter:
    """Records a run, and requests a stop after a step."""

    def __init__(self, stop_after=None):
        self.records = []
        self.stop_after = stop_after

    def record(self, record):
        self.records.append(record)

    def control_signal(self):
        return (
            ControlSignal.STOP
            if self.stop_after is not None and self.last_step + 1 >= self.stop_after
            else ControlSignal.CONTINUE
        )

    @property
    def last_step(self):
        return max((record["step"] for record in self.records), default=0)

    @property
    def training_records(self):
        return [record for record in self.records if record["kind"] == "training"]


def small_spec(shards, out, overrides=(), **settings):
    return RunSpec(load_config(PRESET, [*SMALL, *overrides]), shards, str(out), **settings)


def local_worker(reporter):
    return WorkerContext(0, 1, torch.device("cpu"), "local", reporter)


def train_runs(rank, world_size, shards, out, runs, stop_after=None, init_url=None):
    """Train each of `runs` (overrides by name) in turn; return the training records of each by name.

    Args:
        stop_after: by name, the step after which a stop is requested.
        init_url: model folder that initializes the runs.
    """
    losses = {}
    for name, overrides in runs.items():
        reporter = RecordingReporter((stop_after or {}).get(name))
        spec = small_spec(shards, f"{out}/{name}", overrides, init_url=init_url)
        run_training(spec, WorkerContext(rank, world_size, torch.device("cpu"), "local", reporter))
        losses[name] = reporter.training_records
    return losses
