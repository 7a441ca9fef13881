"""Floating-point operations of a training step; a multiply-add counts as two.

Only matrix products and convolutions count, as in model FLOPs utilization (Chowdhery et al., "PaLM", 2022, appendix
B): norms, activations and losses are bound by memory bandwidth. The backward pass of a layer costs twice its forward
pass, once for the gradient of its weights and once for that of its input. A frozen network or a fixed filter needs
only the second.
"""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.planning.feature_costs import frozen_step_flops
from bsq_ray.planning.layer_costs import (
    Convolution,
    code_channels,
    discriminator_inputs_per_sample,
    discriminator_layers,
    head_layers,
    local_attention_blocks,
    perceptual_layers,
)


def blocks_flops(transformer: config.TransformerConfig, tokens: int, pairs: int) -> int:
    """Return the operations of the blocks' forward pass for one sample of N tokens.

    Per block 2 N (4 D² + 2 D h) for the projections and 4 D for each pair of a query and a key, scores and weighted
    values together (Kaplan et al., 2020, section 2.1).

    Args:
        pairs: pairs of a query and a key that attention computes, masked ones included.
    """
    width, hidden = transformer.width, int(transformer.width * transformer.mlp_ratio)
    return transformer.layers * (2 * tokens * (4 * width**2 + 2 * width * hidden) + 4 * pairs * width)


def attention_pairs(model: config.TokenizerModelConfig) -> int:
    """Return the pairs of a query and a key that a block of the tokenizer computes for one image or clip.

    The pairs of two frames times T², or with block-causal attention T (T + 1) / 2. Local attention computes frames of
    many tokens in blocks of 8 x 8 queries, each with the keys at most `attention_radius` rows and columns away.
    """
    blocks = local_attention_blocks(model)
    frame_pairs = blocks.queries * blocks.keys_per_query if blocks else model.grid_size**4
    return frame_pairs * (model.frames * (model.frames + 1) // 2 if model.causal else model.frames**2)


def _last_matmul_flops(transformer: config.TransformerConfig, tokens: int) -> int:
    """Return the operations of the last matrix product of each block, which checkpointing does not recompute."""
    return transformer.layers * 2 * tokens * transformer.width * int(transformer.width * transformer.mlp_ratio)


def tokenizer_forward_flops(model: config.TokenizerModelConfig) -> int:
    """Return the operations of encoder, projections and decoder for one clip, without a codebook search."""
    frame_tokens = model.grid_size**2
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    return (
        2 * model.frames * frame_tokens * (patch + channels) * model.encoder.width
        + blocks_flops(model.encoder, model.frames * frame_tokens, attention_pairs(model))
        + _decoder_forward_flops(model)
    )


def _decoder_forward_flops(model: config.TokenizerModelConfig) -> int:
    """Return the operations from codes to patches for one clip."""
    tokens, decoder = model.frames * model.grid_size**2, model.decoder
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    per_token = channels * decoder.width + (decoder.width + patch) * decoder.head_hidden_dim
    return 2 * tokens * per_token + blocks_flops(decoder, tokens, attention_pairs(model))


def tokenizer_step_flops(run: config.TokenizerConfig) -> dict[str, float]:
    """Return the operations per image or clip of a training step with all phases.

    Returns:
        generator: forward and backward pass, and with gradient checkpointing the recomputation.
        LPIPS: of the reconstruction with its gradient, and of the original; with the texture loss, of its Gram
            matrices.
        discriminator: in the generator's phase and in its own, with R1 averaged over the steps, and with its frozen
            network.
    """
    model, loss = run.model, run.loss
    forward = tokenizer_forward_flops(model)
    frame_tokens = model.grid_size**2
    trained_flops, transformers = forward, [model.encoder, model.decoder]
    # The images need no gradient.
    input_gradient_flops = 2 * model.frames * frame_tokens * 3 * model.patch_size**2 * model.encoder.width
    if run.training.only == "decoder":
        trained_flops, transformers = _decoder_forward_flops(model), [model.decoder]
        # The codes need no gradient.
        input_gradient_flops = 2 * model.frames * frame_tokens * code_channels(model.quantizer) * model.decoder.width
    recomputed_flops = sum(
        blocks_flops(sizes, frame_tokens * model.frames, attention_pairs(model))
        - _last_matmul_flops(sizes, frame_tokens * model.frames)
        for sizes in transformers
    )
    generator = forward + 2 * trained_flops - input_gradient_flops
    if model.gradient_checkpointing:
        generator += recomputed_flops
    perceptual = 0
    for network in loss.perceptual_networks if loss.perceptual_weight else ():
        slices = perceptual_layers(network, model.image_size)
        perceptual += 3 * model.frames * sum(layer.flops for layers in slices for layer in layers)
        if loss.gram_weight:
            # Products F Fᵀ of both images, and two more for the gradient.
            last_layers = [layers[-1] for layers in slices]
            perceptual += 4 * model.frames * sum(2 * (la.out_channels * la.output_size) ** 2 for la in last_layers)
    layers = discriminator_layers(loss.adversarial, model.image_size, model.frames)
    first_layers = layers[:1]
    if layers and loss.adversarial.discriminator == "features":
        first_layers = [head[0] for head in head_layers(loss.adversarial, model.image_size)]
    per_input = _discriminator_flops(layers, first_layers, loss.adversarial)
    per_input += frozen_step_flops(loss.adversarial, model.image_size)
    discriminator = discriminator_inputs_per_sample(loss.adversarial, model.frames) * per_input
    return {"generator": generator, "LPIPS": perceptual, "discriminator": discriminator}


def _discriminator_flops(
    layers: list[Convolution], first_layers: list[Convolution], adversarial: config.AdversarialConfig
) -> float:
    """Return the discriminator's operations per input for a forward pass of F operations.

    Reconstruction: forward pass, gradient of its pixels for the generator, gradient of the weights (2 F + 2 F).
    Original: forward pass and gradient of the weights (3 F minus the gradients that are not needed). A step with R1
    (Mescheder et al., 2018) differentiates a gradient of the original's logits: F for the gradient, 2 F for the second
    derivatives, and the gradient of the first layers' inputs, which is otherwise not needed.
    """
    forward = sum(layer.flops for layer in layers)
    fixed_filter_flops = sum(layer.flops for layer in layers if not layer.trainable)
    input_gradient_flops = sum(layer.flops for layer in first_layers)
    penalty = 3 * forward + input_gradient_flops if adversarial.r1_gamma else 0
    return 7 * forward - 2 * fixed_filter_flops - input_gradient_flops + penalty / adversarial.r1_every
