"""Training stage of the tokenizer: generator (encoder, quantizer, decoder) against discriminator.

    x ─generator─▶ x̂   generator: |x - x̂| + LPIPS + softplus(-D(x̂)) + quantizer penalty       (paper equation 2)
                        with loss.gram_weight: + distance of the Gram matrices of LPIPS's feature maps
    x, sg(x̂) ─D─▶       discriminator: softplus(-D(x)) + softplus(D(x̂)), every 16th step + R1

With training.only = decoder, encoder and quantizer are frozen, and the quantizer penalty is left out.

LPIPS and the image discriminators score clips frame by frame; losses are means over frames.

Shape suffixes: B images or clips, C channels, T frames, H and W pixels, N tokens, L bits. "images" without a suffix are
(B, C, H, W) or clips (B, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.data.data_source import Batch, DataSource
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.losses.adversarial import (
    Logits,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    mean_over_heads,
    r1_penalty,
)
from bsq_ray.losses.perceptual import PerceptualLoss
from bsq_ray.metrics.psnr import psnr
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.discriminators.feature_heads import FeatureDiscriminator
from bsq_ray.models.frame_layout import frames_time_major
from bsq_ray.models.quantizers import KeptBits
from bsq_ray.models.quantizers.usage import CodeUsage
from bsq_ray.models.tokenizer import Tokenizer, TokenizerOutput, Tokens
from bsq_ray.runtime.collectives import average_over_workers, num_workers
from bsq_ray.runtime.device import to_device
from bsq_ray.training.engines.engine import Engine
from bsq_ray.training.schedule import ramp
from bsq_ray.training.stages.bit_noise import BitNoise
from bsq_ray.training.stages.nested_dropout import NestedDropout
from bsq_ray.training.stages.stage import Engines, PhaseOutput, Stage, StepContext, compile_blocks

_NUM_SAMPLE_IMAGES = 8


@dataclass(frozen=True)
class GeneratorContext(StepContext):
    """Values of the whole batch for the generator's phase on one of its micro batches.

    Attributes:
        batch_statistics: see `Quantizer.batch_statistics`; None for a single micro batch.
        kept_bits: nested bits of the micro batch; None without them.
        flipped_BNL: bits that flip before the decoder; None if none can.
    """

    batch_statistics: Tensor | None
    kept_bits: KeptBits | None
    flipped_BNL: Tensor | None


@dataclass(frozen=True)
class DiscriminatorContext(StepContext):
    """Values that the generator's phase passes to the discriminator's.

    Attributes:
        real_images: discriminator input, originals.
        fake_logits: the discriminator's logits of the reconstructions, with their graph; None before the adversarial
            loss starts.
    """

    real_images: Tensor
    fake_logits: Logits | None


class TokenizerStage(Stage):
    """Trains a `Tokenizer`, with a discriminator unless its weight is zero."""

    def __init__(self, run_config: config.TokenizerConfig, source: DataSource, device: torch.device) -> None:
        self.loss_config = run_config.loss
        self.device = device
        tokenizer = Tokenizer(run_config.model).to(device)
        self._frozen_parts: tuple[nn.Module, ...] = ()
        if run_config.training.only == "decoder":
            self._frozen_parts = tokenizer.encoder, tokenizer.to_code, tokenizer.quantizer
        for part in self._frozen_parts:
            part.requires_grad_(False).eval()
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
            self.perceptual = PerceptualLoss(*self.loss_config.perceptual_networks).to(device)
        quantizer_config = run_config.model.quantizer
        self.num_bits = quantizer_config.bits
        self.across_workers = False
        self.nested_dropout: NestedDropout | None = None
        if isinstance(quantizer_config, config.BSQConfig | config.LFQConfig):
            self.across_workers = quantizer_config.entropy.across_workers
            if quantizer_config.keep:
                seed = run_config.training.seed
                self.nested_dropout = NestedDropout(quantizer_config.keep, seed, self.across_workers)
        training_config = run_config.training
        self.bit_noise = BitNoise(training_config.bit_noise, training_config.seed)
        self._patch_size = run_config.model.patch_size
        self._recent_bits: list[Tensor] = []

    def frozen_parts(self) -> Sequence[nn.Module]:
        """Return the parts that determine the tokens if the decoder alone is trained, otherwise none."""
        return self._frozen_parts

    def phases(self, step: int) -> list[str]:
        """Return the generator and, from its start step on, the discriminator."""
        return ["generator", "discriminator"] if self._is_adversarial_step(step) else ["generator"]

    def prepare_step(self, micro_batches: Sequence[Batch], engines: Engines, step: int) -> list[StepContext | None]:
        """Sample nested bits and bit noise, and average the quantizer's statistics over accumulated micro batches.

        The spectral norms of a discriminator are estimated once per step here, not in each forward pass.

        The codebook entropy is a function of these means, so its mean over micro batches is not that of the batch.
        The statistics take one more pass of the encoder. A single micro batch needs none: the quantizer averages over
        the workers in the forward pass.
        """
        if self._is_adversarial_step(step):
            self._update_spectral_norms(engines["discriminator"])
        kept_bits: list[KeptBits | None] = [None] * len(micro_batches)
        if self.nested_dropout is not None:
            kept_bits = list(
                self.nested_dropout.sample([len(batch.keys) for batch in micro_batches], step, self.device)
            )
        mean = None
        if len(micro_batches) > 1 and not self._frozen_parts:
            tokenizer = cast(Tokenizer, engines["generator"].module)
            mean = self._mean_statistics(
                [
                    tokenizer.batch_statistics(self._to_device(batch), kept)
                    for batch, kept in zip(micro_batches, kept_bits, strict=True)
                ]
            )
        token_shapes = [self._token_shape(batch) for batch in micro_batches]
        flips = self.bit_noise.sample(token_shapes, step, self.progress, self.device)
        return [
            None if mean is None and kept is None and flipped_BNL is None else GeneratorContext(mean, kept, flipped_BNL)
            for kept, flipped_BNL in zip(kept_bits, flips, strict=True)
        ]

    def _update_spectral_norms(self, engine: Engine) -> None:
        if isinstance(engine.module, FeatureDiscriminator):
            with engine.gathered_parameters():
                engine.module.update_spectral_norms()

    def _token_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Return the shape (B, N, L) of the bits of a batch of images or clips."""
        frames = 1 if batch.values_B.ndim == 4 else batch.values_B.shape[2]
        height, width = batch.values_B.shape[-2:]
        return len(batch.keys), frames * height * width // self._patch_size**2, self.num_bits

    def _mean_statistics(self, parts: list[Tensor | None]) -> Tensor | None:
        """Return the mean of the micro batches' statistics over all micro batches and, if so configured, workers."""
        statistics = [part for part in parts if part is not None]
        if not statistics:
            return None
        mean = torch.stack(statistics).mean(0)
        return average_over_workers(mean) if self.across_workers else mean

    def loss(self, phase: str, batch: Batch, engines: Engines, context: StepContext | None, step: int) -> PhaseOutput:
        """Compute the loss of a phase; see `Stage.loss`."""
        if phase == "generator":
            assert context is None or isinstance(context, GeneratorContext)
            return self._generator_loss(batch, engines, context, step)
        assert isinstance(context, DiscriminatorContext)
        return self._discriminator_loss(engines, context, step)

    def _generator_loss(
        self, batch: Batch, engines: Engines, context: GeneratorContext | None, step: int
    ) -> PhaseOutput:
        loss_config, adversarial_config = self.loss_config, self.loss_config.adversarial
        real = self._to_device(batch)
        use_adaptive_weight = adversarial_config.adaptive_weight and self._is_adversarial_step(step)
        # The graph of an autograd.grad call must not run through an engine.
        generator = engines["generator"].module if use_adaptive_weight else engines["generator"]
        inputs = () if context is None else (context.batch_statistics, context.kept_bits, context.flipped_BNL)
        output: TokenizerOutput = generator(real, *inputs)
        fake = output.images.clamp(-1, 1)
        pixel_loss = F.l1_loss if loss_config.reconstruction == "l1" else F.mse_loss
        reconstruction = pixel_loss(fake if loss_config.clamp_reconstruction else output.images, real)
        scalars = {"reconstruction": reconstruction, "quantizer": output.quantized.loss}
        total = loss_config.reconstruction_weight * reconstruction
        if self.perceptual is not None:
            perceptual_terms = self._perceptual_terms(self.perceptual, frames_time_major(fake), frames_time_major(real))
            scalars |= {name: values_B.mean() for name, values_B in perceptual_terms.items()}
            total = total + loss_config.perceptual_weight * scalars["perceptual"]
            if "gram" in scalars:
                total = total + loss_config.gram_weight * scalars["gram"]
        fake_logits: Logits | None = None
        if self._is_adversarial_step(step):
            scalars["loss/generator"], fake_logits = self._adversarial_term(self._discriminator_input(fake), engines)
            weight: float | Tensor = adversarial_config.weight
            if use_adaptive_weight:
                tokenizer = cast(Tokenizer, engines["generator"].module)
                scalars["adaptive_weight"] = adaptive_weight(total, scalars["loss/generator"], tokenizer.last_layer)
                weight = weight * scalars["adaptive_weight"]
            total = total + weight * scalars["loss/generator"]
        quantizer_weight = loss_config.quantizer_weight * ramp(
            step, loss_config.quantizer_weight_ramp_steps, loss_config.quantizer_weight_start_factor
        )
        if not self._frozen_parts:
            total = total + quantizer_weight * output.quantized.loss
        self._recent_bits.append(output.quantized.bits_BNL.detach())
        scalars = {"loss": total, **scalars, **output.quantized.stats}
        next_context = DiscriminatorContext(self._discriminator_input(real), fake_logits)
        return PhaseOutput(total, {name: value.detach() for name, value in scalars.items()}, next_context)

    def _perceptual_terms(self, perceptual: PerceptualLoss, fake_BCHW: Tensor, real_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the terms on the features of LPIPS by name, unweighted (B,): "perceptual" and, if used, "gram"."""
        if not self.loss_config.gram_weight:
            return {"perceptual": perceptual(fake_BCHW, real_BCHW)}
        distance_B, gram_B = perceptual.with_texture(fake_BCHW, real_BCHW)
        return {"perceptual": distance_B, "gram": gram_B}

    def _to_device(self, batch: Batch) -> Tensor:
        return to_float(to_device(batch.values_B, self.device))

    def _discriminator_input(self, images: Tensor) -> Tensor:
        """Return clips for a clip discriminator, otherwise images or frames."""
        return images if self.loss_config.adversarial.discriminator == "stylegan2-3d" else frames_time_major(images)

    def _adversarial_term(self, fake_images: Tensor, engines: Engines) -> tuple[Tensor, Logits]:
        """Compute the generator's adversarial loss with a gradient for the images only.

        The discriminator's phase uses the same images and weights, so it reuses these logits and their graph. That
        saves one of eight forward passes per step. test_phase_gradients_equal_two_pass_version compares the gradients
        with separate forward passes.

        Args:
            fake_images: discriminator input, reconstructions.

        Returns:
            The scalar loss, and the logits with the discriminator's graph.
        """
        discriminator = engines["discriminator"].module
        discriminator.requires_grad_(True)
        images = fake_images.detach().requires_grad_()
        [fake_logits] = discriminator(images)
        loss = generator_loss(fake_logits, self.loss_config.adversarial.objective)
        [gradient] = torch.autograd.grad(loss, images, retain_graph=True)
        # surrogate = Σ gradient · (fake - sg(fake)): the value is 0, and d(surrogate)/d(fake) = gradient.
        surrogate = (gradient * (fake_images - images.detach())).sum()
        return loss.detach() + surrogate, fake_logits

    def _discriminator_loss(self, engines: Engines, context: DiscriminatorContext, step: int) -> PhaseOutput:
        adversarial_config = self.loss_config.adversarial
        apply_r1 = adversarial_config.r1_gamma > 0 and (step + 1) % adversarial_config.r1_every == 0
        real_images, fake = context.real_images, context.fake_logits
        assert fake is not None
        if apply_r1:
            real_images = real_images.detach().requires_grad_()
        [real] = engines["discriminator"].module(real_images)
        total = discriminator_loss(real, fake, adversarial_config.objective)
        scalars = {"loss/discriminator": total}
        scalars |= {"logits_real": mean_over_heads(real), "logits_fake": mean_over_heads(fake)}
        if apply_r1:
            scalars["r1"] = r1_penalty(real, real_images, adversarial_config.r1_gradient)
            # Multiplied by the number of steps between two penalties.
            total = total + adversarial_config.r1_gamma / 2 * adversarial_config.r1_every * scalars["r1"]
        return PhaseOutput(total, {name: value.detach() for name, value in scalars.items()})

    @torch.no_grad()
    def evaluate(self, batch: Batch, engines: Engines) -> tuple[dict[str, float], Tensor]:
        """Compute PSNR in dB and, if it is part of the loss, LPIPS, both per image or frame.

        The sample image shows originals above reconstructions; for clips, frames of the first one.
        """
        real = to_float(batch.values_B.to(self.device))
        output: TokenizerOutput = engines["generator"](real)
        fake = output.images.clamp(-1, 1)
        real_BCHW, fake_BCHW = frames_time_major(real), frames_time_major(fake)
        original, reconstruction = to_uint8(real_BCHW), to_uint8(fake_BCHW)
        metrics = {"psnr": float(psnr(to_float(original), to_float(reconstruction)).mean())}
        metrics |= self._psnr_of_fewer_bits(engines, real, output.quantized.bits_BNL)
        if self.perceptual is not None:
            metrics |= self._perceptual_metrics(self.perceptual, fake_BCHW, real_BCHW)
        rows = [torch.cat(list(to_uint8(_sample_images(images))), dim=2) for images in (real, fake)]
        return metrics, torch.cat(rows, dim=1).cpu()

    def _psnr_of_fewer_bits(self, engines: Engines, real: Tensor, bits_BNL: Tensor) -> dict[str, float]:
        """Return the PSNR in dB at each smaller number of nested bits; costs a pass of the decoder for each."""
        if self.nested_dropout is None:
            return {}
        tokenizer = cast(Tokenizer, engines["generator"].module)
        original_BCHW = to_float(to_uint8(frames_time_major(real)))
        side = tokenizer.config.grid_size
        tokens = Tokens(bits_BNL, (1 if real.ndim == 4 else real.shape[2], side, side))
        metrics = {}
        for num_bits in self.nested_dropout.keep[:-1]:
            fake = tokenizer.decode(tokens.first(num_bits))
            fake_BCHW = to_float(to_uint8(frames_time_major(fake.reshape(real.shape))))
            metrics[f"psnr_at_{num_bits}_bits"] = float(psnr(original_BCHW, fake_BCHW).mean())
        return metrics

    def _perceptual_metrics(self, perceptual: PerceptualLoss, fake_BCHW: Tensor, real_BCHW: Tensor) -> dict[str, float]:
        """Return LPIPS and, with the texture loss, its value and the ratio of the weighted gradients' norms.

        The gradients are those of the reconstructed images. With ratio 1, both terms move the pixels alike.
        """
        loss_config = self.loss_config
        if not loss_config.gram_weight:
            return {"perceptual": float(perceptual(fake_BCHW, real_BCHW).mean())}
        with torch.enable_grad():
            images_BCHW = fake_BCHW.detach().requires_grad_()
            terms = self._perceptual_terms(perceptual, images_BCHW, real_BCHW)
            norms = {
                name: torch.autograd.grad(values_B.sum(), images_BCHW, retain_graph=True)[0].norm()
                for name, values_B in terms.items()
            }
        metrics = {name: float(values_B.detach().mean()) for name, values_B in terms.items()}
        ratio = loss_config.gram_weight * norms["gram"] / (loss_config.perceptual_weight * norms["perceptual"])
        metrics["gram_gradient_ratio"] = float(ratio.nan_to_num())
        return metrics

    def pop_metrics(self) -> dict[str, float]:
        """Return code usage and bit entropy of all workers' tokens since the last call; collective."""
        if not self._recent_bits:
            return {}
        usage = CodeUsage(self.num_bits)
        for bits_BNL in self._recent_bits:
            usage.update(bits_BNL)
        self._recent_bits.clear()
        if num_workers() > 1:
            counts = usage.counts().to(self.device)
            dist.all_reduce(counts)
            usage.set_counts(counts)
        usage_metrics = usage.compute()
        num_reachable_codes = min(2**usage.sub_bits, usage_metrics["tokens"])
        # Relative to the number of codes that so few tokens can reach.
        return {
            "code_usage": usage_metrics["code_usage"] * 2**usage.sub_bits / num_reachable_codes,
            "bit_entropy": usage_metrics["bit_entropy"],
        }

    def _is_adversarial_step(self, step: int) -> bool:
        return "discriminator" in self.modules and step >= self.loss_config.adversarial.start_step


def _sample_images(images: Tensor) -> Tensor:
    """Return the first images of a batch, or evenly spaced frames of the first clip, (n, C, H, W)."""
    if images.ndim == 4:
        return images[:_NUM_SAMPLE_IMAGES]
    num_frames = images.shape[2]
    return images[0].transpose(0, 1)[
        torch.linspace(0, num_frames - 1, min(num_frames, _NUM_SAMPLE_IMAGES)).round().long()
    ]
