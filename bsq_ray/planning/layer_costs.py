"""Networks of a run as lists of layers, for counting parameters, operations and activations.

Shape letters in formulas: D width, h hidden width of a block's MLP, C channels of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from bsq_ray import config

# DINO ViT-S/8, and the heads on feature maps.
DINO_WIDTH, DINO_PATCH_SIZE, _DINO_TAPS = 384, 8, 5
HEAD_KERNEL = 9


@dataclass(frozen=True)
class Convolution:
    """A square convolution on one image, or one over space and time on a clip.

    Attributes:
        in_channels, out_channels: channels of input and output.
        kernel: side of the kernel.
        output_size: side of the output, pixels.
        bias: True if it has a bias.
        trainable: False for fixed low-pass filters.
        depthwise: True if each output channel has one input channel.
        kernel_frames: frames that the kernel spans.
        output_frames: frames of the output.
    """

    in_channels: int
    out_channels: int
    kernel: int
    output_size: int
    bias: bool = True
    trainable: bool = True
    depthwise: bool = False
    kernel_frames: int = 1
    output_frames: int = 1

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: out · in · kernel² · kernel_frames + out."""
        return (
            self.out_channels * (self.in_channels * self.kernel**2 * self.kernel_frames + self.bias)
            if self.trainable
            else 0
        )

    @property
    def flops(self) -> int:
        """Operations: 2 · out · in · kernel² · kernel_frames · output_size² · output_frames; in = 1 if depthwise."""
        volume = self.kernel**2 * self.kernel_frames * self.output_size**2 * self.output_frames
        return 2 * self.out_channels * (1 if self.depthwise else self.in_channels) * volume


@dataclass(frozen=True)
class FeatureMap:
    """Channels C and positions P of a feature map of one image."""

    channels: int
    positions: int


# As in models/layers/local_attention.py: the largest grid that is computed as a whole, and the side of a block.
_MAX_DENSE_TOKENS, _LOCAL_BLOCK = 272, 8


@dataclass(frozen=True)
class LocalBlocks:
    """Blocks of local attention in one frame.

    Attributes:
        queries: queries of all blocks, with padding.
        keys: keys of all blocks, each with its margins.
        keys_per_query: keys of a block.
    """

    queries: int
    keys: int
    keys_per_query: int


def local_attention_blocks(model: config.TokenizerModelConfig) -> LocalBlocks | None:
    """Return the blocks in which local attention computes large frames; None if it computes frames as a whole."""
    radius = model.attention_radius
    if radius is None or model.grid_size**2 <= _MAX_DENSE_TOKENS or model.grid_size <= radius + 1:
        return None
    num_blocks = (-(-model.grid_size // _LOCAL_BLOCK)) ** 2
    keys_per_query = (_LOCAL_BLOCK + 2 * radius) ** 2
    return LocalBlocks(num_blocks * _LOCAL_BLOCK**2, num_blocks * keys_per_query, keys_per_query)


def num_transformer_parameters(transformer: config.TransformerConfig, positions: int) -> int:
    """Return the parameters of position embeddings, two norms, and the blocks."""
    return positions * transformer.width + 4 * transformer.width + num_block_parameters(transformer)


def num_block_parameters(transformer: config.TransformerConfig) -> int:
    """Return the parameters of all blocks, each 4 D² + 2 D h + 9 D + h: norms, attention, MLP, with biases."""
    width, hidden = transformer.width, int(transformer.width * transformer.mlp_ratio)
    return transformer.layers * (4 * width**2 + 2 * width * hidden + 9 * width + hidden)


def num_block_matrix_elements(transformer: config.TransformerConfig) -> int:
    """Return the elements of the matrices of all blocks, each 4 D² + 2 D h: what Muon optimizes."""
    width, hidden = transformer.width, int(transformer.width * transformer.mlp_ratio)
    return transformer.layers * (4 * width**2 + 2 * width * hidden)


def code_channels(quantizer: config.QuantizerConfig) -> int:
    """Return the number of channels between encoder and decoder (C)."""
    if isinstance(quantizer, config.VQConfig):
        return quantizer.code_dim
    return len(quantizer.levels) if isinstance(quantizer, config.FSQConfig) else quantizer.bits


def num_tokenizer_parameters(model: config.TokenizerModelConfig) -> int:
    """Return the parameters of encoder, code projections, codebook if any, decoder and its two-layer head."""
    positions = _num_positions(model)
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    encoder = model.encoder
    codebook = model.quantizer.codebook_size * channels if isinstance(model.quantizer, config.VQConfig) else 0
    return (
        patch * encoder.width
        + num_transformer_parameters(encoder, positions)
        + (encoder.width + 1) * channels
        + codebook
        + num_decoder_parameters(model)
    )


def num_decoder_parameters(model: config.TokenizerModelConfig) -> int:
    """Return the parameters that turn codes into patches: code projection, decoder and its two-layer head."""
    decoder, positions, patch = model.decoder, _num_positions(model), 3 * model.patch_size**2
    return (
        (code_channels(model.quantizer) + 1) * decoder.width
        + num_transformer_parameters(decoder, positions)
        + (decoder.width + 1) * decoder.head_hidden_dim
        + (decoder.head_hidden_dim + 1) * patch
    )


def _num_positions(model: config.TokenizerModelConfig) -> int:
    """Return the learned position embeddings of a Transformer, spatial and temporal."""
    return model.position_rows**2 + model.temporal_positions


def stylegan_channels(adversarial: config.AdversarialConfig, image_size: int) -> dict[int, int]:
    """Return the channels of StyleGAN2's discriminator by resolution, the largest first."""
    sizes = [image_size >> n for n in range(image_size.bit_length()) if image_size >> n >= 4]
    return {size: max(1, min(adversarial.channel_base // size, adversarial.channel_max)) for size in sizes}


def discriminator_inputs_per_sample(adversarial: config.AdversarialConfig, frames: int) -> int:
    """Return the number of discriminator inputs (images or clips) of one sample."""
    return 1 if adversarial.discriminator == "stylegan2-3d" else frames


def discriminator_layers(adversarial: config.AdversarialConfig, image_size: int, frames: int = 1) -> list[Convolution]:
    """Return the discriminator's layers for one image, or for one clip if its input is clips.

    The list is empty without adversarial loss. Linear layers are convolutions of 1 x 1 images. The frozen network of
    `features` is not among them, see `feature_costs`.
    """
    if not adversarial.weight:
        return []
    if adversarial.discriminator == "features":
        return [layer for head in head_layers(adversarial, image_size) for layer in head]
    if adversarial.discriminator == "patchgan":
        return _patchgan(adversarial, image_size)
    if adversarial.discriminator == "stylegan2-3d":
        return _clip_discriminator(adversarial, image_size, frames)
    channels = stylegan_channels(adversarial, image_size)
    layers = [Convolution(3, channels[image_size], 1, image_size)]
    for size, half_size in pairwise(channels):
        in_channels, out_channels = channels[size], channels[half_size]
        layers += [
            Convolution(in_channels, in_channels, 3, size),
            Convolution(in_channels, in_channels, 4, size + 1, trainable=False, depthwise=True),
            Convolution(in_channels, out_channels, 3, half_size),
            Convolution(in_channels, in_channels, 4, half_size, trainable=False, depthwise=True),
            Convolution(in_channels, out_channels, 1, half_size, bias=False),
        ]
    last = channels[4]
    return [
        *layers,
        Convolution(last + 1, last, 3, 4),
        Convolution(16 * last, last, 1, 1),
        Convolution(last, 1, 1, 1),
    ]


def num_discriminator_parameters(adversarial: config.AdversarialConfig, image_size: int, frames: int = 1) -> int:
    """Return the parameters of all layers, with two per channel of each norm of PatchGAN and of feature heads."""
    layers = discriminator_layers(adversarial, image_size, frames)
    norms = 0
    if adversarial.discriminator in ("patchgan", "features"):
        norms = sum(2 * layer.out_channels for layer in layers if not layer.bias)
    return sum(layer.num_parameters for layer in layers) + norms


def num_kernel_elements(adversarial: config.AdversarialConfig, image_size: int, frames: int = 1) -> int:
    """Return the elements of the discriminator's 2-D and 3-D convolution kernels, without its linear layers."""
    layers = discriminator_layers(adversarial, image_size, frames)
    kernels = [layer for layer in layers if layer.output_size > 1]
    return sum(layer.num_parameters - layer.trainable * layer.bias * layer.out_channels for layer in kernels)


def perceptual_layers(network: Literal["vgg", "alex"], image_size: int) -> list[list[Convolution]]:
    """Return the convolutions of the LPIPS network for one image; each list ends where features are compared."""
    if network == "alex":
        first = (image_size + 2 * 2 - 11) // 4 + 1
        second = (first - 3) // 2 + 1
        third = (second - 3) // 2 + 1
        shapes = [(3, 64, 11, first), (64, 192, 5, second), (192, 384, 3, third), (384, 256, 3, third)]
        return [[Convolution(*shape)] for shape in (*shapes, (256, 256, 3, third))]
    slices, in_channels = [], 3
    for number, (out_channels, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        widths = [in_channels] + [out_channels] * count
        slices.append([Convolution(a, b, 3, image_size >> number) for a, b in pairwise(widths)])
        in_channels = out_channels
    return slices


def feature_maps(adversarial: config.AdversarialConfig, image_size: int) -> list[FeatureMap]:
    """Return the five maps that the heads score."""
    if adversarial.features == "dino":
        return [FeatureMap(DINO_WIDTH, (image_size // DINO_PATCH_SIZE) ** 2)] * _DINO_TAPS
    last_layers = [layers[-1] for layers in perceptual_layers(adversarial.features, image_size)]
    return [FeatureMap(layer.out_channels, layer.output_size**2) for layer in last_layers]


def head_layers(adversarial: config.AdversarialConfig, image_size: int) -> list[list[Convolution]]:
    """Return the convolutions of each head; their positions are counted as frames of one pixel."""
    heads = []
    for feature_map in feature_maps(adversarial, image_size):
        channels, positions = min(feature_map.channels, adversarial.channel_max), feature_map.positions
        first = Convolution(feature_map.channels, channels, 1, 1, bias=False, output_frames=positions)
        second = Convolution(channels, channels, 1, 1, bias=False, kernel_frames=HEAD_KERNEL, output_frames=positions)
        heads.append([first, second, Convolution(channels, 1, 1, 1, output_frames=positions)])
    return heads


def pooled_side(network: str, side: int) -> int:
    """Return the side after a max pooling: 2 x 2 in VGG, 3 x 3 with stride 2 in AlexNet."""
    return side // 2 if network == "vgg" else (side - 3) // 2 + 1


def frames_per_resolution(image_size: int, frames: int) -> list[int]:
    """Return the frames at each resolution of the clip discriminator: its last blocks halve even numbers."""
    blocks = image_size.bit_length() - 3
    halvings = min(blocks, (frames & -frames).bit_length() - 1)
    return [frames >> max(0, number - (blocks - halvings)) for number in range(blocks + 1)]


def _clip_discriminator(adversarial: config.AdversarialConfig, image_size: int, frames: int) -> list[Convolution]:
    channels, frame_counts = stylegan_channels(adversarial, image_size), frames_per_resolution(image_size, frames)
    layers = [Convolution(3, channels[image_size], 1, image_size, output_frames=frames)]
    for (size, half_size), (in_frames, out_frames) in zip(pairwise(channels), pairwise(frame_counts), strict=True):
        in_channels, out_channels = channels[size], channels[half_size]
        layers += [
            Convolution(in_channels, in_channels, 3, size, kernel_frames=3, output_frames=in_frames),
            Convolution(in_channels, out_channels, 3, half_size, kernel_frames=3, output_frames=out_frames),
            Convolution(in_channels, out_channels, 1, half_size, bias=False, output_frames=out_frames),
        ]
    last, last_frames = channels[4], frame_counts[-1]
    return [
        *layers,
        Convolution(last + 1, last, 3, 4, kernel_frames=3, output_frames=last_frames),
        Convolution(16 * last_frames * last, last, 1, 1),
        Convolution(last, 1, 1, 1),
    ]


def _patchgan(adversarial: config.AdversarialConfig, image_size: int) -> list[Convolution]:
    widths = [min(width, adversarial.channel_max) for width in (64, 128, 256, 512)]
    size = image_size // 2
    layers = [Convolution(3, widths[0], 4, size)]
    for number, (in_channels, out_channels) in enumerate(pairwise(widths)):
        size = size // 2 if number < 2 else size - 1
        layers.append(Convolution(in_channels, out_channels, 4, size, bias=False))
    return [*layers, Convolution(widths[-1], 1, 4, size - 1)]
