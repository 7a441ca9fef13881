"""EfficientNet-Lite0 in plain torch with its published ImageNet weights, as a feature extractor.

    image ─224 px─▶ stem ─▶ 16 inverted bottlenecks ─▶ head ─mean over positions─▶ features (1280) ─▶ logits (1000)

Tan and Le (ICML 2019) without squeeze-and-excitation and with ReLU6. Padding is TensorFlow's "same": an odd
total adds the extra pixel at the right or the bottom.

Shape suffixes: B images, D features, V classes.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.models.pretrained_weights import resolve_once

NUM_FEATURES, NUM_CLASSES = 1280, 1000
_INPUT_SIZE, _MEAN, _SCALE = 224, 127 / 255, 128 / 255
# Number of blocks, kernel size, stride of the first block, expansion ratio, output channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


class EfficientNetLite0(nn.Module):
    """Maps images to the 1280 features of the last pooling layer; `logits` maps features to class logits.

    Raises:
        ValueError: the published weights are not available.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_SameConv(3, 32, 3, 2)]
        channels = 32
        for num_blocks, kernel, stride, expansion, out_channels in _STAGES:
            for block in range(num_blocks):
                layers.append(_Bottleneck(channels, out_channels, kernel, 1 if block else stride, expansion))
                channels = out_channels
        self.layers = nn.Sequential(*layers, _SameConv(channels, NUM_FEATURES, 1))
        self.top = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        weights = resolve_once("imagenet-classifier").tensors
        convs = [module for module in self.modules() if isinstance(module, _SameConv)]
        assert 5 * len(convs) + 2 == len(weights)
        with torch.no_grad():
            for index, layer in enumerate(convs):
                layer.conv.weight.copy_(weights[f"conv.{index}.weight"])
                layer.norm.weight.copy_(weights[f"conv.{index}.gain"])
                layer.norm.bias.copy_(weights[f"conv.{index}.bias"])
                cast(Tensor, layer.norm.running_mean).copy_(weights[f"conv.{index}.mean"])
                cast(Tensor, layer.norm.running_var).copy_(weights[f"conv.{index}.var"])
            self.top.weight.copy_(weights["top.weight"])
            self.top.bias.copy_(weights["top.bias"])
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map RGB images in [-1, 1], of any size, to fp32 features (B, 1280)."""
        x_BCHW = F.interpolate(images_BCHW.float(), (_INPUT_SIZE, _INPUT_SIZE), mode="bicubic", antialias=True)
        x_BCHW = ((x_BCHW + 1) / 2 - _MEAN) / _SCALE
        return cast(Tensor, self.layers(x_BCHW).mean((2, 3)))

    @torch.no_grad()
    def logits(self, features_BD: Tensor) -> Tensor:
        """Return the logits (B, 1000) of the ImageNet classes."""
        return cast(Tensor, self.top(features_BD))


class _SameConv(nn.Module):
    """Convolution with "same" padding, batch norm, and ReLU6 unless `max_value` is infinite."""

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
    """Inverted bottleneck: expand, depthwise convolution, project; residual if both shapes are equal."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden_channels = channels * expansion
        expand = [_SameConv(channels, hidden_channels, 1)] if expansion > 1 else []
        depthwise = _SameConv(hidden_channels, hidden_channels, kernel, stride, groups=hidden_channels)
        self.layers = nn.Sequential(
            *expand, depthwise, _SameConv(hidden_channels, out_channels, 1, max_value=float("inf"))
        )
        self.has_residual = stride == 1 and channels == out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.layers(x_BCHW)
        return x_BCHW + y_BCHW if self.has_residual else y_BCHW
