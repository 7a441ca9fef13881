"""Train a denoising tokenizer with a stage of your own: noise is added to the input, the target is clean.

    bsq-ray data pack photos shards/train --max-side 512
    PYTHONPATH=examples bsq-ray train tokenizer --config demo --data shards/train --out runs/denoise \\
      training.stage_class=04_custom_stage:DenoisingStage training.stage_options.noise=0.3

Engines, schedule, EMA, checkpoints, resuming and export work as for the stages of the package.
`bsq-ray reconstruct --model runs/denoise/model` then reconstructs with it.
"""

import torch
from torch import Tensor

from bsq_ray import Tokenizer, config
from bsq_ray.data.data_source import Batch, DataSource
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.training.stages.stage import Engines, PhaseOutput, Stage, StepContext


class DenoisingStage(Stage):
    """Train a `Tokenizer` to reconstruct clean images from noisy ones.

    Args:
        noise: standard deviation of the noise; pixels are in [-1, 1].
    """

    def __init__(
        self, run_config: config.TokenizerConfig, source: DataSource, device: torch.device, noise: float = 0.2
    ) -> None:
        self.device, self.noise = device, noise
        # The first module is averaged and exported, so it is the model that the configuration describes.
        self.modules = {"tokenizer": Tokenizer(run_config.model).to(device)}

    def phases(self, step: int) -> list[str]:
        return ["tokenizer"]

    def loss(self, phase: str, batch: Batch, engines: Engines, context: StepContext | None, step: int) -> PhaseOutput:
        images_BCHW = to_float(batch.values_B.to(self.device))
        output_BCHW, quantized = engines[phase](images_BCHW + self.noise * torch.randn_like(images_BCHW))
        reconstruction = (output_BCHW - images_BCHW).abs().mean()
        loss = reconstruction + 0.02 * quantized.loss
        return PhaseOutput(loss, {"loss": loss.detach(), "reconstruction": reconstruction.detach()})

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        images_BCHW = to_float(batch.values_B.to(self.device))
        decoded_BCHW = engines["tokenizer"](images_BCHW).images.clamp(-1, 1)
        return {"l1": float((decoded_BCHW - images_BCHW).abs().mean())}, to_uint8(decoded_BCHW[0]).cpu()

    def pop_metrics(self) -> dict[str, float]:
        return {}
