"""What one sample of a training step needs, whatever is trained: the formulas of a stage, brought into one form."""

from __future__ import annotations

from dataclasses import dataclass

from bsq_ray import config
from bsq_ray.planning.activations import discriminator_phase, generator_phase
from bsq_ray.planning.flops import tokenizer_flops
from bsq_ray.planning.layer_costs import discriminator_parameters, perceptual_layers, tokenizer_parameters
from bsq_ray.planning.token_costs import token_bytes, token_flops, token_parameters

# An ImageNet JPEG as published (138 GB of 1.28 million images).
_JPEG_BYTES = 110_000
# A video of UCF-101 as published (6.5 GB of 13,320); a clip is cut from a whole one.
_VIDEO_BYTES = 490_000


@dataclass(frozen=True)
class Needs:
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
    frozen: int
    copies: float
    flops: dict[str, float]
    activations: tuple[float, ...]
    read: float


def needs(run: config.AnyConfig) -> Needs:
    """What a sample of this run needs."""
    return _tokenizer(run) if isinstance(run, config.TokenizerConfig) else _tokens(run)


def _tokenizer(run: config.TokenizerConfig) -> Needs:
    model, loss = run.model, run.loss
    generator = tokenizer_parameters(model)
    discriminator = discriminator_parameters(loss.adversarial, model.image_size, model.frames)
    perceptual = 0
    if loss.perceptual_weight:
        slices = perceptual_layers(loss.perceptual_network, model.image_size)
        perceptual = sum(layer.parameters for layers in slices for layer in layers)
    # bf16 copies of all, or fp32 ones of the discriminator's equalised weights.
    half = run.training.engine.precision != "fp32"
    return Needs(
        unit="images" if model.frames == 1 else "clips",
        parameters={"generator": generator, "discriminator": discriminator},
        frozen=perceptual,
        copies=2 * (generator + discriminator + perceptual) if half else 4 * discriminator,
        flops=tokenizer_flops(run),
        activations=(generator_phase(run), discriminator_phase(run)),
        read=_JPEG_BYTES if model.frames == 1 else _VIDEO_BYTES,
    )


def _tokens(run: config.MaskedLMConfig | config.PriorConfig) -> Needs:
    half = run.training.engine.precision != "fp32"
    parameters = token_parameters(run.model)
    return Needs(
        unit="rows",
        parameters={"model": parameters},
        frozen=0,
        copies=2 * parameters if half else 0,
        flops={"model": token_flops(run.model)},
        activations=(token_bytes(run.model, half),),
        read=run.model.tokens * run.model.bits / 8,
    )
