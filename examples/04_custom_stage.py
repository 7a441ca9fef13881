"""Train a denoising tokenizer with a stage of your own: noise is added to the input, the target is clean.

    bsq-ray data pack photos shards/train --max-side 512
    python examples/04_custom_stage.py shards/train 100

The trainer adds schedule, EMA, checkpoints and resuming to the loop below. CONTRIBUTING.md explains how to add a stage.
"""

import sys

import torch
from torch import Tensor

from bsq_ray import Tokenizer, config
from bsq_ray.data.data_source import Batch
from bsq_ray.data.factory import build_source
from bsq_ray.data.stream import training_batches
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.training.engines.engine import build_engine
from bsq_ray.training.stages.stage import Engines, PhaseOutput, Stage, StepContext


class DenoisingStage(Stage):
    """Train a `Tokenizer` to reconstruct clean images from noisy ones."""

    def __init__(self, run_config: config.TokenizerConfig) -> None:
        self.modules = {"tokenizer": Tokenizer(run_config.model)}

    def phases(self, step: int) -> list[str]:
        return ["tokenizer"]

    def loss(self, phase: str, batch: Batch, engines: Engines, context: StepContext | None, step: int) -> PhaseOutput:
        images_BCHW = to_float(batch.values_B)
        output_BCHW, quantized = engines[phase](images_BCHW + 0.2 * torch.randn_like(images_BCHW))
        loss = (output_BCHW - images_BCHW).abs().mean() + 0.02 * quantized.loss
        return PhaseOutput(loss, {"loss": loss.detach()})

    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        images_BCHW = to_float(batch.values_B)
        decoded_BCHW = self.modules["tokenizer"].reconstruct(images_BCHW)
        return {"l1": float((decoded_BCHW - images_BCHW).abs().mean())}, to_uint8(decoded_BCHW[0])

    def pop_metrics(self) -> dict[str, float]:
        return {}


if __name__ == "__main__":
    url, steps = sys.argv[1], int(sys.argv[2])
    run_config = config.load_config("demo", ["model.encoder.layers=2", "training.engine.kind=ddp"])
    stage = DenoisingStage(run_config)
    engine = build_engine(
        stage.modules["tokenizer"], run_config.training, micro_batch=8, accumulation_steps=1, device=torch.device("cpu")
    )
    batches = training_batches(
        build_source(run_config, url), run_config.data, batch_size=8, rank=0, world_size=1, seed=0
    )
    for step, batch in zip(range(steps), batches, strict=False):
        output = stage.loss("tokenizer", batch, {"tokenizer": engine}, None, step)
        engine.backward(output.loss)
        engine.step(1e-3)
        print(f"step {step + 1}: loss {float(output.scalars['loss']):.4f}")
    print(stage.evaluate(batch, {})[0])
