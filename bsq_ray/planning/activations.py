"""Bytes that the forward pass of a tokenizer's training step saves for the backward pass.

Shape letters: D width, H heads, h hidden width of a block's MLP; e is the size of a matrix product's operand, 2 bytes
under bf16 autocast and 4 in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from bsq_ray import config
from bsq_ray.planning.feature_costs import (
    frozen_activation_bytes,
    head_activation_bytes,
    head_input_bytes,
    trunk_activation_bytes,
)
from bsq_ray.planning.flops import attention_pairs
from bsq_ray.planning.layer_costs import (
    code_channels,
    discriminator_inputs_per_sample,
    discriminator_layers,
    frames_per_resolution,
    local_attention_blocks,
    perceptual_layers,
    stylegan_channels,
)


def block_activation_bytes(transformer: config.TransformerConfig, half: bool, per_frame: bool = False) -> int:
    """Return the bytes that one transformer block saves per token.

    With `per_frame`, attention runs frame by frame, which saves e D more for its concatenated outputs.

    Inputs of the two norms, fp32: 8 D, and their statistics: 16. Operands: input of the qkv projection e D, q, k and v
    3 e D, attention's output e D with its log-sums 4 H, input of the MLP e D, its hidden layer before and after GELU
    2 e h. Counted as in Korthikanti et al., 2022, section 4, without dropout.
    """
    operand_bytes = 2 if half else 4
    hidden = int(transformer.width * transformer.mlp_ratio)
    return (
        8 * transformer.width
        + 16
        + operand_bytes * ((7 if per_frame else 6) * transformer.width + 2 * hidden)
        + 4 * transformer.heads
    )


def tokenizer_activation_bytes(model: config.TokenizerModelConfig, half: bool) -> float:
    """Return the bytes that encoder, quantizer and decoder save for one image or clip.

    With gradient checkpointing each block saves its fp32 input, and one block at a time saves everything.
    """
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    per_token = (2 if half else 4) * (patch + model.decoder.head_hidden_dim) + 12 * patch + 24 * channels
    return _tokens(model) * (per_token + _transformer_bytes(model, (model.encoder, model.decoder), half))


def decoder_activation_bytes(model: config.TokenizerModelConfig, half: bool) -> float:
    """Return the bytes that a tokenizer saves for one image or clip if its decoder alone is trained."""
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    per_token = (2 if half else 4) * (channels + model.decoder.head_hidden_dim) + 12 * patch
    return _tokens(model) * (per_token + _transformer_bytes(model, (model.decoder,), half))


def _tokens(model: config.TokenizerModelConfig) -> int:
    return model.frames * model.grid_size**2


def _transformer_bytes(
    model: config.TokenizerModelConfig, transformers: Sequence[config.TransformerConfig], half: bool
) -> float:
    """Return the bytes that transformers save per token."""
    operand_bytes = 2 if half else 4

    def block_bytes(sizes: config.TransformerConfig) -> float:
        saved = block_activation_bytes(sizes, half, model.causal and model.frames > 1)
        return saved + operand_bytes * sizes.width * _copies_per_token(model)

    per_token = 0.0
    for sizes in transformers:
        # The two outer norms, and the projection that follows.
        per_token += 8 * sizes.width + 16 + operand_bytes * sizes.width
        if not model.gradient_checkpointing:
            per_token += sizes.layers * block_bytes(sizes)
        else:
            per_token += sizes.layers * 4 * sizes.width
    if model.gradient_checkpointing:
        per_token += max(block_bytes(sizes) for sizes in transformers)
    return per_token


def _copies_per_token(model: config.TokenizerModelConfig) -> float:
    """Return how many more vectors of queries, keys and values local attention saves than one of each per token."""
    blocks = local_attention_blocks(model)
    return (blocks.queries + 2 * blocks.keys) / model.grid_size**2 - 3 if blocks else 0.0


def attention_mask_bytes(model: config.TokenizerModelConfig, only_decoder: bool, half: bool) -> float:
    """Return the bytes of masks that local attention saves in all blocks, for all samples together."""
    if model.attention_radius is None or model.grid_size <= model.attention_radius + 1:
        return 0.0
    layers = model.decoder.layers + (0 if only_decoder else model.encoder.layers)
    return (2 if half else 4) * attention_pairs(model) * (1 if model.gradient_checkpointing else layers)


def perceptual_activation_bytes(loss: config.TokenizerLossConfig, image_size: int, half: bool) -> int:
    """Return the bytes that LPIPS of one reconstructed image saves; the original's features are freed before.

    See `trunk_activation_bytes`. At the five layers the difference of the unit features is fp32; so are the features,
    which is a copy under autocast. The texture loss reads that copy, and saves the fp32 differences of the Gram
    matrices.
    """
    if not loss.perceptual_weight:
        return 0
    total = 0
    for network in loss.perceptual_networks:
        total += trunk_activation_bytes(network, image_size, half)
        for layers in perceptual_layers(network, image_size):
            compared = layers[-1].out_channels * layers[-1].output_size ** 2
            total += 4 * compared * (2 if half else 1)
            if loss.gram_weight:
                total += 4 * layers[-1].out_channels ** 2
    return total


def discriminator_activation_bytes(
    adversarial: config.AdversarialConfig, image_size: int, half: bool, frames: int = 1
) -> int:
    """Return the bytes that the discriminator saves for one image, or for one clip if its input is clips.

    Activation functions work in place, so a block saves its input, both activated outputs and both filtered maps. The
    frozen network of `features` is included; its maps are the inputs of the heads, which DINO copies under autocast.
    """
    operand_bytes = 2 if half else 4
    if adversarial.weight and adversarial.discriminator == "features":
        copied_bytes = head_input_bytes(adversarial, image_size, half) if adversarial.features == "dino" and half else 0
        return (
            frozen_activation_bytes(adversarial, image_size, half)
            + head_activation_bytes(adversarial, image_size, half)
            + copied_bytes
        )
    layers = discriminator_layers(adversarial, image_size, frames)
    if not layers:
        return 0
    if adversarial.discriminator == "patchgan":
        # Outputs of each convolution, of its norm (the first has none) and of its leaky ReLU; not of the last.
        saved_elements = sum(
            (3 if number else 2) * layer.out_channels * layer.output_size**2 for number, layer in enumerate(layers[:-1])
        )
        return operand_bytes * (3 * image_size**2 + saved_elements)
    channels = stylegan_channels(adversarial, image_size)
    if adversarial.discriminator == "stylegan2-3d":
        frame_counts = frames_per_resolution(image_size, frames)
        saved_elements = 3 * image_size**2 * frames
        for (size, half_size), (in_frames, out_frames) in zip(pairwise(channels), pairwise(frame_counts), strict=True):
            in_channels, out_channels = channels[size], channels[half_size]
            saved_elements += (
                2 * in_channels * size**2 * in_frames + (2 * in_channels + out_channels) * half_size**2 * out_frames
            )
        return operand_bytes * (saved_elements + channels[4] * 16 * 3 * frame_counts[-1])
    saved_elements = 3 * image_size**2
    for size, half_size in pairwise(channels):
        in_channels, out_channels = channels[size], channels[half_size]
        saved_elements += in_channels * (2 * size**2 + (size + 1) ** 2 + half_size**2) + out_channels * half_size**2
    return operand_bytes * (saved_elements + channels[4] * 16 * 3)


def generator_phase_bytes(run: config.TokenizerConfig) -> float:
    """Return the bytes per sample at the start of the generator's backward pass: tokenizer, LPIPS, discriminator."""
    model, loss, half = run.model, run.loss, run.training.engine.precision != "fp32"
    num_inputs = discriminator_inputs_per_sample(loss.adversarial, model.frames)
    bytes_per_input = discriminator_activation_bytes(loss.adversarial, model.image_size, half, model.frames)
    perceptual = model.frames * perceptual_activation_bytes(loss, model.image_size, half)
    tokenizer_bytes = decoder_activation_bytes if run.training.only == "decoder" else tokenizer_activation_bytes
    return tokenizer_bytes(model, half) + perceptual + num_inputs * bytes_per_input


def discriminator_phase_bytes(run: config.TokenizerConfig) -> float:
    """Return the bytes per sample at the start of the discriminator's backward pass: original and reconstruction.

    A step with R1 also saves the graph of the original's gradient. Without R1 the original needs no gradient, so that
    the frozen network of `features` saves nothing but the inputs of the heads.
    """
    model, adversarial, half = run.model, run.loss.adversarial, run.training.engine.precision != "fp32"
    bytes_per_input = discriminator_activation_bytes(adversarial, model.image_size, half, model.frames)
    if adversarial.weight and adversarial.discriminator == "features" and not adversarial.r1_gamma:
        of_original = head_activation_bytes(adversarial, model.image_size, half)
        of_original += head_input_bytes(adversarial, model.image_size, half)
        return model.frames * (bytes_per_input + of_original)
    return (
        discriminator_inputs_per_sample(adversarial, model.frames)
        * bytes_per_input
        * (3 if adversarial.r1_gamma else 2)
    )
