"""The Inception network of FID ("2015-12-05"), in plain torch with its published weights.

    image ─299 px─▶ stem ─▶ 3 x A ─▶ reduction ─▶ 4 x C ─▶ reduction ─▶ 2 x E ─mean over positions─▶ features (2048)

Szegedy et al., CVPR 2016. The published graph differs from torchvision's Inception v3: average pools exclude the
padding, the last block pools by maximum, and the input is resized to 299 x 299 without aligned corners.

Shape suffixes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.models.pretrained_weights import resolve_once

NUM_FEATURES = 2048
_INPUT_SIZE = 299
_Size = int | tuple[int, int]


class Inception(nn.Module):
    """Map images to the 2048 features of the last pooling layer.

    Raises:
        ValueError: the published weights are not available.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _Conv(3, 32, 3, stride=2),
            _Conv(32, 32, 3),
            _Conv(32, 64, 3, padding=1),
            nn.MaxPool2d(3, 2),
            _Conv(64, 80, 1),
            _Conv(80, 192, 3),
            nn.MaxPool2d(3, 2),
            *(_block_a(channels, pool_channels) for channels, pool_channels in ((192, 32), (256, 64), (288, 64))),
            _reduction_b(288),
            *(_block_c(768, inner) for inner in (128, 160, 160, 192)),
            _reduction_d(768),
            _block_e(1280, nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)),
            _block_e(2048, nn.MaxPool2d(3, 1, padding=1)),
        )
        self._load_weights()
        self.requires_grad_(False)
        self.eval()

    def _load_weights(self) -> None:
        weights = resolve_once("fid-inception").tensors
        convolutions = [module for module in self.modules() if isinstance(module, _Conv)]
        assert 4 * len(convolutions) == len(weights)
        with torch.no_grad():
            for number, layer in enumerate(convolutions):
                layer.conv.weight.copy_(weights[f"conv.{number}.weight"])
                layer.bn.weight.fill_(1)
                layer.bn.bias.copy_(weights[f"conv.{number}.bias"])
                cast(Tensor, layer.bn.running_mean).copy_(weights[f"conv.{number}.mean"])
                cast(Tensor, layer.bn.running_var).copy_(weights[f"conv.{number}.var"])

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map RGB in [-1, 1] of any size to fp32 features (B, 2048)."""
        size = (_INPUT_SIZE, _INPUT_SIZE)
        x_BCHW = F.interpolate(images_BCHW.float(), size, mode="bilinear", align_corners=False)
        return cast(Tensor, self.layers(x_BCHW).mean((2, 3)))


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel: _Size, *, stride: int = 1, padding: _Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)), inplace=True)


class _Concat(nn.Module):
    """Parallel branches, concatenated along the channels."""

    def __init__(self, *branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*layers) for layers in branches)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.cat([branch(x_BCHW) for branch in self.branches], 1)


def _block_a(channels: int, pool_channels: int) -> _Concat:
    return _Concat(
        [_Conv(channels, 64, 1)],
        [_Conv(channels, 48, 1), _Conv(48, 64, 5, padding=2)],
        [_Conv(channels, 64, 1), _Conv(64, 96, 3, padding=1), _Conv(96, 96, 3, padding=1)],
        [nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), _Conv(channels, pool_channels, 1)],
    )


def _reduction_b(channels: int) -> _Concat:
    return _Concat(
        [_Conv(channels, 384, 3, stride=2)],
        [_Conv(channels, 64, 1), _Conv(64, 96, 3, padding=1), _Conv(96, 96, 3, stride=2)],
        [nn.MaxPool2d(3, 2)],
    )


def _row(channels: int, out_channels: int) -> _Conv:
    return _Conv(channels, out_channels, (1, 7), padding=(0, 3))


def _column(channels: int, out_channels: int) -> _Conv:
    return _Conv(channels, out_channels, (7, 1), padding=(3, 0))


def _block_c(channels: int, inner: int) -> _Concat:
    double = [_column(inner, inner), _row(inner, inner), _column(inner, inner), _row(inner, 192)]
    return _Concat(
        [_Conv(channels, 192, 1)],
        [_Conv(channels, inner, 1), _row(inner, inner), _column(inner, 192)],
        [_Conv(channels, inner, 1), *double],
        [nn.AvgPool2d(3, 1, padding=1, count_include_pad=False), _Conv(channels, 192, 1)],
    )


def _reduction_d(channels: int) -> _Concat:
    return _Concat(
        [_Conv(channels, 192, 1), _Conv(192, 320, 3, stride=2)],
        [_Conv(channels, 192, 1), _row(192, 192), _column(192, 192), _Conv(192, 192, 3, stride=2)],
        [nn.MaxPool2d(3, 2)],
    )


def _block_e(channels: int, pool: nn.Module) -> _Concat:
    return _Concat(
        [_Conv(channels, 320, 1)],
        [_Conv(channels, 384, 1), _split(384)],
        [_Conv(channels, 448, 1), _Conv(448, 384, 3, padding=1), _split(384)],
        [pool, _Conv(channels, 192, 1)],
    )


def _split(channels: int) -> _Concat:
    """A row filter and a column filter of three taps, side by side."""
    return _Concat(
        [_Conv(channels, channels, (1, 3), padding=(0, 1))], [_Conv(channels, channels, (3, 1), padding=(1, 0))]
    )
