"""EfficientNet-Lite0 with its published ImageNet weights, in plain torch: what a public classifier sees in images.

    image ─224 px─▶ stem ─▶ 16 inverted bottlenecks ─▶ head ─mean over places─▶ features (1280) ─▶ logits (1000)

Tan and Le (ICML 2019) without squeeze-and-excitation and with ReLU6; paddings are TensorFlow's "same", which put the
odd pixel at the right and the bottom.

Shape suffixes: B images, D features, V classes.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.metrics.pretrained_weights import resolve_once

NUM_FEATURES, NUM_CLASSES = 1280, 1000
_INPUT_SIZE, _MEAN, _SCALE = 224, 127 / 255, 128 / 255
# Blocks, kernel, stride of the first, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


class EfficientNetLite0(nn.Module):
    """Images to the 1280 features of the last pooling layer; `logits` makes the classes of them.

    Raises:
        ValueError: the published weights are not to be had.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Conv(3, 32, 3, 2)]
        channels = 32
        for blocks, kernel, stride, expansion, out in _STAGES:
            for block in range(blocks):
                layers.append(_Bottleneck(channels, out, kernel, 1 if block else stride, expansion))
                channels = out
        self.layers = nn.Sequential(*layers, _Conv(channels, NUM_FEATURES, 1))
        self.top = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        weights = resolve_once("imagenet-classifier").tensors
        convs = [module for module in self.modules() if isinstance(module, _Conv)]
        assert 5 * len(convs) + 2 == len(weights)
        with torch.no_grad():
            for number, layer in enumerate(convs):
                layer.conv.weight.copy_(weights[f"conv.{number}.weight"])
                layer.norm.weight.copy_(weights[f"conv.{number}.gain"])
                layer.norm.bias.copy_(weights[f"conv.{number}.bias"])
                cast(Tensor, layer.norm.running_mean).copy_(weights[f"conv.{number}.mean"])
                cast(Tensor, layer.norm.running_var).copy_(weights[f"conv.{number}.var"])
            self.top.weight.copy_(weights["top.weight"])
            self.top.bias.copy_(weights["top.bias"])
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """RGB in [-1, 1] of any size to fp32 (B, 1280)."""
        x_BCHW = F.interpolate(images_BCHW.float(), (_INPUT_SIZE, _INPUT_SIZE), mode="bicubic", antialias=True)
        x_BCHW = ((x_BCHW + 1) / 2 - _MEAN) / _SCALE
        return cast(Tensor, self.layers(x_BCHW).mean((2, 3)))

    @torch.no_grad()
    def logits(self, features_BD: Tensor) -> Tensor:
        """Of ImageNet's classes, (B, 1000)."""
        return cast(Tensor, self.top(features_BD))


class _Conv(nn.Module):
    """Convolution with "same" padding, batch norm, and ReLU6 where it is wanted."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, max_value: float = 6.0
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.max_value = kernel, stride, max_value
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padding = []
        for side in (x_BCHW.shape[3], x_BCHW.shape[2]):
            total_padding = max((-(-side // self.stride) - 1) * self.stride + self.kernel - side, 0)
            padding += [total_padding // 2, total_padding - total_padding // 2]
        x_BCHW = self.norm(self.conv(F.pad(x_BCHW, padding)))
        return x_BCHW if self.max_value == float("inf") else x_BCHW.clamp(0, self.max_value)


class _Bottleneck(nn.Module):
    """Expand, filter each channel, project; plus the input where shapes allow."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        expand = [_Conv(channels, inner, 1)] if expansion > 1 else []
        depthwise = _Conv(inner, inner, kernel, stride, groups=inner)
        self.layers = nn.Sequential(*expand, depthwise, _Conv(inner, out_channels, 1, max_value=float("inf")))
        self.has_residual = stride == 1 and channels == out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.layers(x_BCHW)
        return x_BCHW + y_BCHW if self.has_residual else y_BCHW
