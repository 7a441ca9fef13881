"""The tokenizer's stage: generator (encoder, quantiser, decoder) against discriminator.

    x ─generator─▶ x̂   generator: |x - x̂| + LPIPS + softplus(-D(x̂)) + quantiser's penalty     (paper equation 2)
    x, sg(x̂) ─D─▶       discriminator: softplus(-D(x)) + softplus(D(x̂)), every 16th step + R1

Clips are judged frame by frame, by LPIPS and by the discriminators of images; losses are means over frames.

Shape suffixes: B images or clips, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.data.data_source import Batch
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.models.discriminators.stylegan2 import build_discriminator
from bsq_ray.models.quantizers.usage import CodeUsage
from bsq_ray.models.tokenizer import Tokenizer, TokenizerOutput
from bsq_ray.models.warm_start import initial_weights
from bsq_ray.training.schedule import ramp
from bsq_ray.training.stages.stage import Engines, Stage, compile_blocks

_NUM_SAMPLE_IMAGES = 8


class TokenizerStage(Stage):
    """Trains a `Tokenizer`, with a discriminator if its weight is not zero."""

    def __init__(self, run_config: config.TokenizerConfig, device: torch.device, init_url: str | None = None) -> None:
        self.loss_config = run_config.loss
        self.device = device
        tokenizer = Tokenizer(run_config.model).to(device)
        if init_url:
            tokenizer.load_state_dict(initial_weights(run_config.model, init_url))
        if run_config.training.engine.compile:
            compile_blocks(tokenizer.blocks)
        self.modules: dict[str, nn.Module] = {"generator": tokenizer}
        if self.loss_config.adversarial.weight:
            discriminator = build_discriminator(
                self.loss_config.adversarial, run_config.model.image_size, run_config.model.frames
            )
            self.modules["discriminator"] = discriminator.to(device)
        self.perceptual: PerceptualLoss | None = None
        if self.loss_config.perceptual_weight:
            self.perceptual = PerceptualLoss(self.loss_config.perceptual_network).to(device)
        self.num_bits = run_config.model.quantizer.bits
        self._recent_bits: list[Tensor] = []

    def phases(self, step: int) -> list[str]:
        """The generator, and the discriminator from its first step on."""
        return ["generator", "discriminator"] if self._is_adversarial_step(step) else ["generator"]

    def loss(
        self, phase: str, batch: Batch, engines: Engines, context: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        if phase == "generator":
            return self._generator_loss(batch, engines, context, step)
        return self._discriminator_loss(engines, context, step)

    def _generator_loss(
        self, batch: Batch, engines: Engines, context: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss_config, adversarial_config = self.loss_config, self.loss_config.adversarial
        real = to_float(batch.values_B.to(self.device, non_blocking=True))
        use_adaptive_weight = adversarial_config.adaptive_weight and self._is_adversarial_step(step)
        # A graph that autograd.grad walks must not run through an engine.
        generator = engines["generator"].module if use_adaptive_weight else engines["generator"]
        output: TokenizerOutput = generator(real)
        fake = output.images.clamp(-1, 1)
        pixel_loss = F.l1_loss if loss_config.reconstruction == "l1" else F.mse_loss
        reconstruction = pixel_loss(output.images, real)
        scalars = {"reconstruction": reconstruction, "quantizer": output.quantized.loss}
        total = loss_config.reconstruction_weight * reconstruction
        if self.perceptual is not None:
            scalars["perceptual"] = self.perceptual(frames_time_major(fake), frames_time_major(real)).mean()
            total = total + loss_config.perceptual_weight * scalars["perceptual"]
        if self._is_adversarial_step(step):
            scalars["generator"] = self._adversarial_term(self._discriminator_input(fake), engines, context)
            weight: float | Tensor = adversarial_config.weight
            if use_adaptive_weight:
                tokenizer = cast(Tokenizer, engines["generator"].module)
                scalars["adaptive_weight"] = adaptive_weight(total, scalars["generator"], tokenizer.last_layer)
                weight = weight * scalars["adaptive_weight"]
            total = total + weight * scalars["generator"]
        quantizer_weight = loss_config.quantizer_weight * ramp(
            step, loss_config.quantizer_weight_ramp_steps, loss_config.quantizer_weight_start_factor
        )
        total = total + quantizer_weight * output.quantized.loss
        context["real"] = self._discriminator_input(real)
        self._recent_bits.append(output.quantized.bits_BNL.detach())
        scalars = {"loss": total, **scalars, **output.quantized.stats}
        return total, {name: value.detach() for name, value in scalars.items()}

    def _discriminator_input(self, images: Tensor) -> Tensor:
        """What the discriminator takes: clips as they are, or their frames."""
        return images if self.loss_config.adversarial.discriminator == "stylegan2-3d" else frames_time_major(images)

    def _adversarial_term(self, fake_BCHW: Tensor, engines: Engines, context: dict[str, Any]) -> Tensor:
        """The discriminator's loss for the generator, with gradients for the images alone.

        The discriminator's phase learns from the same images before either module has changed, so it takes the logits,
        and the graph under them, from here: one forward pass of a step's eight is spared.
        """
        discriminator = engines["discriminator"].module
        discriminator.requires_grad_(True)
        images_BCHW = fake_BCHW.detach().requires_grad_()
        [context["fake"]] = discriminator(images_BCHW)
        loss = generator_loss(context["fake"], self.loss_config.adversarial.objective)
        [gradient_BCHW] = torch.autograd.grad(loss, images_BCHW, retain_graph=True)
        # Zero, with the loss's gradient.
        surrogate = (gradient_BCHW * (fake_BCHW - images_BCHW.detach())).sum()
        return loss.detach() + surrogate

    def _discriminator_loss(
        self, engines: Engines, context: dict[str, Any], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        adversarial_config = self.loss_config.adversarial
        apply_r1 = adversarial_config.r1_gamma > 0 and (step + 1) % adversarial_config.r1_every == 0
        real_BCHW, fake = context["real"], context["fake"]
        if apply_r1:
            real_BCHW = real_BCHW.detach().requires_grad_()
        [real] = engines["discriminator"].module(real_BCHW)
        total = discriminator_loss(real, fake, adversarial_config.objective)
        scalars = {"discriminator": total, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if apply_r1:
            scalars["r1"] = r1_penalty(real, real_BCHW)
            # Weighted by the number of steps it stands for.
            total = total + adversarial_config.r1_gamma / 2 * adversarial_config.r1_every * scalars["r1"]
        return total, {name: value.detach() for name, value in scalars.items()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        """PSNR and, if it is part of the loss, LPIPS, of clips by frame.

        The picture has originals over reconstructions; of clips, frames of the first one.
        """
        real = to_float(batch.values_B.to(self.device))
        output: TokenizerOutput = engines["generator"](real)
        fake = output.images.clamp(-1, 1)
        real_BCHW, fake_BCHW = frames_time_major(real), frames_time_major(fake)
        original, reconstruction = to_uint8(real_BCHW), to_uint8(fake_BCHW)
        error_B = (original.float() - reconstruction.float()).square().mean((1, 2, 3))
        metrics = {"psnr": float((10 * torch.log10(255**2 / error_B.clamp_min(1e-6))).mean())}
        if self.perceptual is not None:
            metrics["perceptual"] = float(self.perceptual(fake_BCHW, real_BCHW).mean())
        rows = [torch.cat(list(to_uint8(_sample_images(images))), dim=2) for images in (real, fake)]
        return metrics, torch.cat(rows, dim=1).cpu()

    def pop_metrics(self) -> dict[str, float]:
        """Code usage of the images since the last call."""
        if not self._recent_bits:
            return {}
        usage = CodeUsage(self.num_bits)
        for bits_BNL in self._recent_bits:
            usage.update(bits_BNL)
        self._recent_bits.clear()
        usage_metrics = usage.compute()
        num_reachable_codes = min(2**usage.sub_bits, usage_metrics["tokens"])
        # Of the codes that so few tokens could show, how many they do show.
        return {
            "code_usage": usage_metrics["code_usage"] * 2**usage.sub_bits / num_reachable_codes,
            "bit_entropy": usage_metrics["bit_entropy"],
        }

    def _is_adversarial_step(self, step: int) -> bool:
        return "discriminator" in self.modules and step >= self.loss_config.adversarial.start_step


def frames_time_major(images: Tensor) -> Tensor:
    """Clips (B, C, T, H, W) as images (T·B, C, H, W), the first frame of every clip first; images as they are.

    In this order the discriminator's groups hold frames of the same clips, however many workers share a batch.
    """
    return images if images.ndim == 4 else images.permute(2, 0, 1, 3, 4).flatten(0, 1)


def _sample_images(images: Tensor) -> Tensor:
    """The first images of a batch, or frames of the first clip, evenly spaced."""
    if images.ndim == 4:
        return images[:_NUM_SAMPLE_IMAGES]
    num_frames = images.shape[2]
    return images[0].transpose(0, 1)[
        torch.linspace(0, num_frames - 1, min(num_frames, _NUM_SAMPLE_IMAGES)).round().long()
    ]
