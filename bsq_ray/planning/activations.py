"""What the forward pass of a tokenizer's training step keeps for the backward pass, in bytes.

Shape letters: D width, H heads, h hidden width of a block's MLP; e is the size of a matrix product's operand, 2 bytes
under bf16 autocast and 4 in fp32.
"""

from __future__ import annotations

from itertools import pairwise

from bsq_ray import config
from bsq_ray.planning.layer_costs import (
    clip_lengths,
    code_channels,
    discriminator_layers,
    judgements,
    perceptual_layers,
    style_channels,
)


def block_bytes(sizes: config.Transformer, half: bool, by_frame: bool = False) -> int:
    """Kept per token by one transformer block; `by_frame` is attention frame by frame, e D more for its joined parts.

    Inputs of the two norms, fp32: 8 D, and their statistics: 16. Operands: input of the qkv projection e D, q, k and v
    3 e D, attention's output e D with its log-sums 4 H, input of the MLP e D, its hidden layer before and after GELU
    2 e h. Counted as by Korthikanti et al., 2022, section 4, without dropout.
    """
    operand = 2 if half else 4
    hidden = int(sizes.width * sizes.mlp_ratio)
    return 8 * sizes.width + 16 + operand * ((7 if by_frame else 6) * sizes.width + 2 * hidden) + 4 * sizes.heads


def tokenizer_bytes(model: config.TokenizerModel, half: bool) -> int:
    """Kept for one image or clip by encoder, quantiser and decoder.

    With gradient checkpointing each block keeps its fp32 input, and one block at a time all it needs.
    """
    tokens = model.frames * (model.image_size // model.patch_size) ** 2
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    operand = 2 if half else 4
    by_frame = model.causal and model.frames > 1
    per_token = operand * (patch + model.decoder.head_hidden_dim) + 12 * patch + 24 * channels
    for sizes in (model.encoder, model.decoder):
        # The two outer norms, and the projection that follows.
        per_token += 8 * sizes.width + 16 + operand * sizes.width
        if not model.gradient_checkpointing:
            per_token += sizes.layers * block_bytes(sizes, half, by_frame)
        else:
            per_token += sizes.layers * 4 * sizes.width
    if model.gradient_checkpointing:
        per_token += max(block_bytes(sizes, half, by_frame) for sizes in (model.encoder, model.decoder))
    return tokens * per_token


def perceptual_bytes(loss: config.TokenizerLoss, image_size: int, half: bool) -> int:
    """Kept for one image by LPIPS of the reconstruction; the original's features are gone by the backward pass.

    Each convolution keeps its output, in place behind its ReLU; a pooling its output and 8-byte indices. At the five
    layers the difference of the unit features is fp32, and so are the features, which is a copy under autocast.
    """
    if not loss.perceptual_weight:
        return 0
    operand = 2 if half else 4
    slices = perceptual_layers(loss.perceptual_network, image_size)
    total = operand * 3 * image_size**2
    for number, layers in enumerate(slices):
        total += sum(operand * layer.outputs * layer.size**2 for layer in layers)
        compared = layers[-1].outputs * layers[-1].size ** 2
        total += 4 * compared * (2 if half else 1)
        following = slices[number + 1][0] if number + 1 < len(slices) else None
        if following is not None and following.size < layers[-1].size:
            total += (8 + operand) * following.inputs * pooled_side(loss.perceptual_network, layers[-1].size) ** 2
    return total


def pooled_side(network: str, side: int) -> int:
    """Side after a max pooling: 2 x 2 in VGG, 3 x 3 by steps of 2 in AlexNet."""
    return side // 2 if network == "vgg" else (side - 3) // 2 + 1


def discriminator_bytes(section: config.Adversarial, image_size: int, half: bool, frames: int = 1) -> int:
    """Kept by a forward pass of the discriminator for one image, or for one clip if it takes clips.

    Activations happen in place, so a block keeps its input, both activated outputs and what the two filters give.
    """
    operand = 2 if half else 4
    layers = discriminator_layers(section, image_size, frames)
    if not layers:
        return 0
    if section.discriminator == "patchgan":
        # Outputs of each convolution, of its norm (the first has none) and of its leaky ReLU; not of the last.
        kept = sum((3 if number else 2) * layer.outputs * layer.size**2 for number, layer in enumerate(layers[:-1]))
        return operand * (3 * image_size**2 + kept)
    channels = style_channels(section, image_size)
    if section.discriminator == "stylegan2-3d":
        lengths = clip_lengths(image_size, frames)
        kept = 3 * image_size**2 * frames
        for (size, half_size), (before, after) in zip(pairwise(channels), pairwise(lengths), strict=True):
            ours, theirs = channels[size], channels[half_size]
            kept += 2 * ours * size**2 * before + (2 * ours + theirs) * half_size**2 * after
        return operand * (kept + channels[4] * 16 * 3 * lengths[-1])
    kept = 3 * image_size**2
    for size, half_size in pairwise(channels):
        ours, theirs = channels[size], channels[half_size]
        kept += ours * (2 * size**2 + (size + 1) ** 2 + half_size**2) + theirs * half_size**2
    return operand * (kept + channels[4] * 16 * 3)


def generator_phase(run: config.TokenizerConfig) -> float:
    """Bytes per image when the generator's backward pass begins: tokenizer, LPIPS and the discriminator."""
    model, loss, half = run.model, run.loss, run.training.engine.precision != "fp32"
    judged = judgements(loss.adversarial, model.frames)
    once = discriminator_bytes(loss.adversarial, model.image_size, half, model.frames)
    perceptual = model.frames * perceptual_bytes(loss, model.image_size, half)
    return tokenizer_bytes(model, half) + perceptual + judged * once


def discriminator_phase(run: config.TokenizerConfig) -> float:
    """Bytes per image when the discriminator's backward pass begins: original and reconstruction together.

    A step with R1 keeps the graph of the original's gradient too.
    """
    model, adversarial, half = run.model, run.loss.adversarial, run.training.engine.precision != "fp32"
    once = discriminator_bytes(adversarial, model.image_size, half, model.frames)
    return judgements(adversarial, model.frames) * once * (3 if adversarial.r1_gamma else 2)
