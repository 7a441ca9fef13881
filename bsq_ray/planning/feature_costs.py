"""Costs of the discriminator on frozen features: parameters, operations and saved activations of one image.

Shape letters: C channels, P positions of a feature map, D width of DINO, N its tokens, h hidden width of its MLPs; e is
the size of a matrix product's operand, 2 bytes under bf16 autocast and 4 in fp32.
"""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.planning.layer_costs import (
    DINO_PATCH_SIZE,
    DINO_WIDTH,
    HEAD_KERNEL,
    Convolution,
    feature_maps,
    perceptual_layers,
    pooled_side,
)

# DINO ViT-S/8.
_BLOCKS, _ATTENTION_HEADS, _HIDDEN = 12, 6, 4 * DINO_WIDTH


def num_frozen_parameters(adversarial: config.AdversarialConfig, image_size: int) -> int:
    """Return the parameters of the frozen network, 0 for other discriminators."""
    if not _has_features(adversarial):
        return 0
    if adversarial.features == "dino":
        tokens = 1 + (image_size // DINO_PATCH_SIZE) ** 2
        per_block = 4 * DINO_WIDTH**2 + 2 * DINO_WIDTH * _HIDDEN + 9 * DINO_WIDTH + _HIDDEN
        return (3 * DINO_PATCH_SIZE**2 + 1) * DINO_WIDTH + (tokens + 1) * DINO_WIDTH + _BLOCKS * per_block
    slices = perceptual_layers(adversarial.features, image_size)
    return sum(layer.num_parameters for layers in slices for layer in layers)


def frozen_step_flops(adversarial: config.AdversarialConfig, image_size: int) -> float:
    """Return the operations of the frozen network in a training step, for one original and one reconstruction.

    Reconstruction: forward pass, and the gradient of its pixels in the phases of both modules. Original: forward pass.
    Weights need no gradient, but both operands of the products in attention do. A step with R1 needs three more passes
    for the original: the gradient of its pixels, the derivative of that, and the gradient of the loss.
    """
    if not _has_features(adversarial):
        return 0
    layers, attention = _frozen_forward_flops(adversarial, image_size)
    forward, gradient = layers + attention, layers + 2 * attention
    penalty = 3 * gradient / adversarial.r1_every if adversarial.r1_gamma else 0
    return 2 * forward + 2 * gradient + penalty


def _frozen_forward_flops(adversarial: config.AdversarialConfig, image_size: int) -> tuple[int, int]:
    """Return the operations of layers with weights, and of products in attention."""
    if adversarial.features != "dino":
        slices = perceptual_layers(adversarial.features, image_size)
        return sum(layer.flops for layers in slices for layer in layers), 0
    side = image_size // DINO_PATCH_SIZE
    tokens = 1 + side**2
    projections = 2 * tokens * (4 * DINO_WIDTH**2 + 2 * DINO_WIDTH * _HIDDEN)
    patches = Convolution(3, DINO_WIDTH, DINO_PATCH_SIZE, side).flops
    return patches + _BLOCKS * projections, _BLOCKS * 4 * tokens**2 * DINO_WIDTH


def frozen_activation_bytes(adversarial: config.AdversarialConfig, image_size: int, half: bool) -> int:
    """Return the bytes that the frozen network saves for the gradient of one image.

    A linear layer of DINO saves nothing. A block saves the fp32 inputs of its norms 8 D with their statistics 16, q, k,
    v and attention's output 4 e D with its log-sums 4 H, and the input of GELU e h. The last map belongs to no norm.
    """
    if adversarial.features != "dino":
        return trunk_activation_bytes(adversarial.features, image_size, half)
    operand_bytes = 2 if half else 4
    tokens = 1 + (image_size // DINO_PATCH_SIZE) ** 2
    per_token = 8 * DINO_WIDTH + 16 + operand_bytes * (4 * DINO_WIDTH + _HIDDEN) + 4 * _ATTENTION_HEADS
    last_map_bytes = 0 if half else 4 * tokens * DINO_WIDTH
    return operand_bytes * 3 * image_size**2 + tokens * _BLOCKS * per_token + last_map_bytes


def head_activation_bytes(adversarial: config.AdversarialConfig, image_size: int, half: bool) -> int:
    """Return the bytes that the heads save for one image, without their inputs.

    Of each of two layers the inputs of norm and activation; the padded input of the second layer, and that of the last.
    """
    saved_elements = 0
    for feature_map in feature_maps(adversarial, image_size):
        channels = min(feature_map.channels, adversarial.channel_max)
        saved_elements += channels * (6 * feature_map.positions + HEAD_KERNEL - 1)
    return (2 if half else 4) * saved_elements


def head_input_bytes(adversarial: config.AdversarialConfig, image_size: int, half: bool) -> int:
    """Return the bytes of the five feature maps of one image as inputs of the heads."""
    maps = feature_maps(adversarial, image_size)
    return (2 if half else 4) * sum(feature_map.channels * feature_map.positions for feature_map in maps)


def trunk_activation_bytes(network: str, image_size: int, half: bool) -> int:
    """Return the bytes that the network of LPIPS saves for the gradient of one image.

    Each convolution saves its output, which its ReLU overwrites. A pooling saves its output and 8-byte indices.
    """
    operand_bytes = 2 if half else 4
    slices = perceptual_layers("vgg" if network == "vgg" else "alex", image_size)
    total = operand_bytes * 3 * image_size**2
    for number, layers in enumerate(slices):
        total += sum(operand_bytes * layer.out_channels * layer.output_size**2 for layer in layers)
        next_layer = slices[number + 1][0] if number + 1 < len(slices) else None
        if next_layer is not None and next_layer.output_size < layers[-1].output_size:
            pooled = pooled_side(network, layers[-1].output_size)
            total += (8 + operand_bytes) * next_layer.in_channels * pooled**2
    return total


def _has_features(adversarial: config.AdversarialConfig) -> bool:
    return adversarial.weight > 0 and adversarial.discriminator == "features"
