"""The networks of a run as lists of layers, from which parameters, operations and activations are counted.

Shape letters in formulas: D width, h hidden width of a block's MLP, C channels of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from bsq_ray import config


@dataclass(frozen=True)
class Convolution:
    """A square convolution on one image, or one over space and time on a clip.

    Attributes:
        size: side of its output.
        depth: frames that its kernel spans.
        length: frames of its output.
        learned: False for fixed low-pass filters.
    """

    inputs: int
    outputs: int
    kernel: int
    size: int
    bias: bool = True
    learned: bool = True
    depthwise: bool = False
    depth: int = 1
    length: int = 1

    @property
    def parameters(self) -> int:
        """outputs · inputs · kernel² · depth + outputs."""
        return self.outputs * (self.inputs * self.kernel**2 * self.depth + self.bias) if self.learned else 0

    @property
    def flops(self) -> int:
        """2 · outputs · inputs · kernel² · depth · size² · length, with one input per output if depthwise."""
        volume = self.kernel**2 * self.depth * self.size**2 * self.length
        return 2 * self.outputs * (1 if self.depthwise else self.inputs) * volume


def transformer_parameters(sizes: config.Transformer, tokens: int, frames: int) -> int:
    """Position embeddings, two norms, and the blocks."""
    positions = (tokens + (frames if frames > 1 else 0)) * sizes.width
    return positions + 4 * sizes.width + blocks_parameters(sizes)


def blocks_parameters(sizes: config.Transformer) -> int:
    """Per block 4 D² + 2 D h + 9 D + h: norms, attention, MLP, with biases."""
    width, hidden = sizes.width, int(sizes.width * sizes.mlp_ratio)
    return sizes.layers * (4 * width**2 + 2 * width * hidden + 9 * width + hidden)


def code_channels(quantizer: config.Quantizer) -> int:
    """Channels between encoder and decoder (C)."""
    if isinstance(quantizer, config.VQ):
        return quantizer.code_width
    return len(quantizer.levels) if isinstance(quantizer, config.FSQ) else quantizer.bits


def tokenizer_parameters(model: config.TokenizerModel) -> int:
    """Encoder, projections to and from the code, codebook if there is one, decoder and its two-layer head."""
    tokens = (model.image_size // model.patch_size) ** 2
    patch, channels = 3 * model.patch_size**2, code_channels(model.quantizer)
    encoder, decoder = model.encoder, model.decoder
    codebook = model.quantizer.codebook_size * channels if isinstance(model.quantizer, config.VQ) else 0
    return (
        patch * encoder.width
        + transformer_parameters(encoder, tokens, model.frames)
        + (encoder.width + 1) * channels
        + codebook
        + (channels + 1) * decoder.width
        + transformer_parameters(decoder, tokens, model.frames)
        + (decoder.width + 1) * decoder.head_hidden_dim
        + (decoder.head_hidden_dim + 1) * patch
    )


def style_channels(section: config.Adversarial, image_size: int) -> dict[int, int]:
    """Channels of StyleGAN2's discriminator at each resolution, largest first."""
    sizes = [image_size >> n for n in range(image_size.bit_length()) if image_size >> n >= 4]
    return {size: max(1, min(section.channel_base // size, section.channel_max)) for size in sizes}


def judgements(section: config.Adversarial, frames: int) -> int:
    """How many images, or clips, the discriminator takes of one sample."""
    return 1 if section.discriminator == "stylegan2-3d" else frames


def discriminator_layers(section: config.Adversarial, image_size: int, frames: int = 1) -> list[Convolution]:
    """The discriminator's layers for one image, or clip if it takes clips; none without adversarial loss.

    Linear layers are 1 x 1 images.
    """
    if not section.weight:
        return []
    if section.discriminator == "patchgan":
        return _patchgan(section, image_size)
    if section.discriminator == "stylegan2-3d":
        return _clip_discriminator(section, image_size, frames)
    channels = style_channels(section, image_size)
    layers = [Convolution(3, channels[image_size], 1, image_size)]
    for size, half in pairwise(channels):
        ours, theirs = channels[size], channels[half]
        layers += [
            Convolution(ours, ours, 3, size),
            Convolution(ours, ours, 4, size + 1, learned=False, depthwise=True),
            Convolution(ours, theirs, 3, half),
            Convolution(ours, ours, 4, half, learned=False, depthwise=True),
            Convolution(ours, theirs, 1, half, bias=False),
        ]
    last = channels[4]
    return [
        *layers,
        Convolution(last + 1, last, 3, 4),
        Convolution(16 * last, last, 1, 1),
        Convolution(last, 1, 1, 1),
    ]


def discriminator_parameters(section: config.Adversarial, image_size: int, frames: int = 1) -> int:
    """Of its layers, and two per channel of each group norm of PatchGAN."""
    layers = discriminator_layers(section, image_size, frames)
    norms = sum(2 * layer.outputs for layer in layers if not layer.bias) if section.discriminator == "patchgan" else 0
    return sum(layer.parameters for layer in layers) + norms


def perceptual_layers(network: Literal["vgg", "alex"], image_size: int) -> list[list[Convolution]]:
    """The convolutions of LPIPS' network for one image; each list ends where features are compared."""
    if network == "alex":
        first = (image_size + 2 * 2 - 11) // 4 + 1
        second = (first - 3) // 2 + 1
        third = (second - 3) // 2 + 1
        shapes = [(3, 64, 11, first), (64, 192, 5, second), (192, 384, 3, third), (384, 256, 3, third)]
        return [[Convolution(*shape)] for shape in (*shapes, (256, 256, 3, third))]
    slices, inputs = [], 3
    for number, (outputs, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        widths = [inputs] + [outputs] * count
        slices.append([Convolution(a, b, 3, image_size >> number) for a, b in pairwise(widths)])
        inputs = outputs
    return slices


def clip_lengths(image_size: int, frames: int) -> list[int]:
    """Frames at each resolution of the discriminator of clips: its last blocks halve them while they are even."""
    blocks = image_size.bit_length() - 3
    halvings = min(blocks, (frames & -frames).bit_length() - 1)
    return [frames >> max(0, number - (blocks - halvings)) for number in range(blocks + 1)]


def _clip_discriminator(section: config.Adversarial, image_size: int, frames: int) -> list[Convolution]:
    channels, lengths = style_channels(section, image_size), clip_lengths(image_size, frames)
    layers = [Convolution(3, channels[image_size], 1, image_size, length=frames)]
    for (size, half), (before, after) in zip(pairwise(channels), pairwise(lengths), strict=True):
        ours, theirs = channels[size], channels[half]
        layers += [
            Convolution(ours, ours, 3, size, depth=3, length=before),
            Convolution(ours, theirs, 3, half, depth=3, length=after),
            Convolution(ours, theirs, 1, half, bias=False, length=after),
        ]
    last, length = channels[4], lengths[-1]
    return [
        *layers,
        Convolution(last + 1, last, 3, 4, depth=3, length=length),
        Convolution(16 * length * last, last, 1, 1),
        Convolution(last, 1, 1, 1),
    ]


def _patchgan(section: config.Adversarial, image_size: int) -> list[Convolution]:
    widths = [min(width, section.channel_max) for width in (64, 128, 256, 512)]
    size = image_size // 2
    layers = [Convolution(3, widths[0], 4, size)]
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        size = size // 2 if number < 2 else size - 1
        layers.append(Convolution(inputs, outputs, 4, size, bias=False))
    return [*layers, Convolution(widths[-1], 1, 4, size - 1)]
