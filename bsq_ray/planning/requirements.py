"""What one sample of a training step needs, whatever is trained: the formulas of a stage, brought into one form."""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.activations import discriminator_phase_bytes, generator_phase_bytes
from bsq_ray.planning.flops import tokenizer_step_flops
from bsq_ray.planning.layer_costs import num_discriminator_parameters, num_tokenizer_parameters, perceptual_layers
from bsq_ray.planning.token_costs import (
    num_token_model_parameters,
    token_model_activation_bytes,
    token_model_step_flops,
)

# An ImageNet JPEG as published (138 GB of 1.28 million images).
_JPEG_BYTES = 110_000
# A video of UCF-101 as published (6.5 GB of 13,320); a clip is cut from a whole one.
_VIDEO_BYTES = 490_000


@dataclass(frozen=True)
class SampleRequirements:
    """Of one image, clip, or row of a token table.

    Attributes:
        unit: what a sample is called.
        parameters: trained, by module; the first module is the one that is averaged and kept.
        frozen: parameters of a network that only measures.
        copies: bytes of the weights' copies that products take, beside the fp32 ones.
        flops: operations of a step by part, every phase running.
        activations: bytes kept when each phase's backward pass begins.
        read: bytes read from the storage.
    """

    unit: str
    parameters: dict[str, int]
    frozen_parameters: int
    weight_copy_bytes: float
    flops: dict[str, float]
    activations: tuple[float, ...]
    bytes_read: float


def sample_requirements(run: config.AnyConfig) -> SampleRequirements:
    """What a sample of this run needs."""
    return _tokenizer_requirements(run) if isinstance(run, config.TokenizerConfig) else _token_model_requirements(run)


def _tokenizer_requirements(run: config.TokenizerConfig) -> SampleRequirements:
    model, loss = run.model, run.loss
    generator = num_tokenizer_parameters(model)
    discriminator = num_discriminator_parameters(loss.adversarial, model.image_size, model.frames)
    perceptual = 0
    if loss.perceptual_weight:
        slices = perceptual_layers(loss.perceptual_network, model.image_size)
        perceptual = sum(layer.num_parameters for layers in slices for layer in layers)
    # bf16 copies of all, or fp32 ones of the discriminator's equalised weights.
    half = run.training.engine.precision != "fp32"
    return SampleRequirements(
        unit="images" if model.frames == 1 else "clips",
        parameters={"generator": generator, "discriminator": discriminator},
        frozen_parameters=perceptual,
        weight_copy_bytes=2 * (generator + discriminator + perceptual) if half else 4 * discriminator,
        flops=tokenizer_step_flops(run),
        activations=(generator_phase_bytes(run), discriminator_phase_bytes(run)),
        bytes_read=_JPEG_BYTES if model.frames == 1 else _VIDEO_BYTES,
    )


def _token_model_requirements(run: config.MaskedLMConfig | config.PriorConfig) -> SampleRequirements:
    half = run.training.engine.precision != "fp32"
    parameters = num_token_model_parameters(run.model)
    return SampleRequirements(
        unit="rows",
        parameters={"model": parameters},
        frozen_parameters=0,
        weight_copy_bytes=2 * parameters if half else 0,
        flops={"model": token_model_step_flops(run.model)},
        activations=(token_model_activation_bytes(run.model, half),),
        bytes_read=run.model.num_tokens * run.model.bits / 8,
    )
