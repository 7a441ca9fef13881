"""Requirements of one sample of a training step, in the same form for all stages."""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.activations import attention_mask_bytes, discriminator_phase_bytes, generator_phase_bytes
from bsq_ray.planning.feature_costs import num_frozen_parameters
from bsq_ray.planning.flops import tokenizer_step_flops
from bsq_ray.planning.layer_costs import (
    num_decoder_parameters,
    num_discriminator_parameters,
    num_tokenizer_parameters,
    perceptual_layers,
)
from bsq_ray.planning.token_costs import (
    num_token_model_parameters,
    token_model_activation_bytes,
    token_model_step_flops,
)

# Mean size of an ImageNet JPEG (138 GB, 1.28 million images).
_JPEG_BYTES = 110_000
# Mean size of a UCF-101 video (6.5 GB, 13,320 videos); the whole video is read for a clip.
_VIDEO_BYTES = 490_000


@dataclass(frozen=True)
class SampleRequirements:
    """Requirements of one image, clip, or row of a token table.

    Attributes:
        unit: name of a sample, plural.
        parameters: trained parameters by module; the first module is averaged and exported.
        frozen_parameters: parameters of networks that are not trained.
        copied_bytes: bytes of copies of the fp32 weights for matrix products, and of masks of attention.
        flops: operations of a step by part, with all phases.
        activations: bytes saved at the start of each phase's backward pass.
        bytes_read: bytes read from storage.
    """

    unit: str
    parameters: dict[str, int]
    frozen_parameters: int
    copied_bytes: float
    flops: dict[str, float]
    activations: tuple[float, ...]
    bytes_read: float


def sample_requirements(run: config.AnyConfig) -> SampleRequirements:
    """Return the requirements of a sample of this run."""
    return _tokenizer_requirements(run) if isinstance(run, config.TokenizerConfig) else _token_model_requirements(run)


def _tokenizer_requirements(run: config.TokenizerConfig) -> SampleRequirements:
    model, loss = run.model, run.loss
    tokenizer = num_tokenizer_parameters(model)
    generator = num_decoder_parameters(model) if run.training.only == "decoder" else tokenizer
    discriminator = num_discriminator_parameters(loss.adversarial, model.image_size, model.frames)
    perceptual = 0
    if loss.perceptual_weight:
        networks = [perceptual_layers(network, model.image_size) for network in loss.perceptual_networks]
        perceptual = sum(layer.num_parameters for slices in networks for layers in slices for layer in layers)
    frozen_features = num_frozen_parameters(loss.adversarial, model.image_size)
    # bf16 copies of all weights, or fp32 copies of the discriminator's scaled weights (equalized learning rate, or
    # spectral norm).
    half = run.training.engine.precision != "fp32"
    copied = (tokenizer, discriminator, perceptual, frozen_features)
    mask_bytes = attention_mask_bytes(model, run.training.only == "decoder", half)
    return SampleRequirements(
        unit="images" if model.frames == 1 else "clips",
        parameters={"generator": generator, "discriminator": discriminator},
        frozen_parameters=perceptual + frozen_features + tokenizer - generator,
        copied_bytes=(2 * sum(copied) if half else 4 * discriminator) + mask_bytes,
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
        copied_bytes=2 * parameters if half else 0,
        flops={"model": token_model_step_flops(run.model)},
        activations=(token_model_activation_bytes(run.model, half),),
        bytes_read=run.model.num_tokens * run.model.bits / 8,
    )
