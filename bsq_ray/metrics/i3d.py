"""The I3D network of the Fréchet Video Distance, in plain torch with its published Kinetics-400 weights.

    clip ─1a─pool─2b─2c─pool─3b─3c─pool─4b … 4f─pool─5b─5c─▶ average over 2 x 7 x 7 ─▶ 400 logits ─mean─▶ features

Carreira and Zisserman, 2017, as TensorFlow runs it: every convolution and pool pads its input so that the output has
⌈size / stride⌉ places, with what is odd at the end; batch norms have no scale.

Shape suffixes: B clips, T frames, C channels, H and W pixels, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.metrics.pretrained_weights import resolve_once

NUM_FEATURES = 400
# Shorter clips leave the last pool less than its two places in time.
MIN_FRAMES = 9
_INPUT_SIZE = 224
_NORM_EPSILON = 1e-3

_Size = tuple[int, int, int]
# Blocks of four branches between the pools.
_STAGES: tuple[tuple[str, ...], ...] = (
    ("Mixed_3b", "Mixed_3c"),
    ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
    ("Mixed_5b", "Mixed_5c"),
)
_POOLS: tuple[_Size, ...] = ((1, 3, 3), (3, 3, 3), (2, 2, 2))


class I3D(nn.Module):
    """Clips to the 400 logits that FVD compares.

    Raises:
        ValueError: the published weights are not to be had.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in resolve_once("fvd-i3d").tensors.items():
            # A buffer's name has no dots.
            self.register_buffer(name.replace(".", "/"), tensor, persistent=False)

    @torch.no_grad()
    def forward(self, clips_B3THW: Tensor) -> Tensor:
        """RGB in [-1, 1] of any size, at least `FEWEST_FRAMES` frames, to fp32 (B, 400).

        Frames are resized to 224 x 224, bilinear without aligned corners.
        """
        batch, frames = clips_B3THW.shape[0], clips_B3THW.shape[2]
        assert frames >= MIN_FRAMES, f"{frames} frames"
        x_B3HW = clips_B3THW.float().transpose(1, 2).flatten(0, 1)
        x_B3HW = F.interpolate(x_B3HW, (_INPUT_SIZE, _INPUT_SIZE), mode="bilinear", align_corners=False)
        x_BCTHW = x_B3HW.unflatten(0, (batch, frames)).transpose(1, 2)
        x_BCTHW = _pool(self._unit("Conv3d_1a_7x7", x_BCTHW, stride=2), (1, 3, 3), (1, 2, 2))
        x_BCTHW = self._unit("Conv3d_2c_3x3", self._unit("Conv3d_2b_1x1", x_BCTHW))
        for pool, blocks in zip(_POOLS, _STAGES, strict=True):
            x_BCTHW = _pool(x_BCTHW, pool, (min(pool[0], 2), 2, 2))
            for block in blocks:
                x_BCTHW = self._mixed(block, x_BCTHW)
        x_BCTHW = F.avg_pool3d(x_BCTHW, (2, 7, 7), stride=1)
        logits_BDTHW = F.conv3d(
            x_BCTHW, self._tensor("Logits.Conv3d_0c_1x1.weight"), self._tensor("Logits.Conv3d_0c_1x1.bias")
        )
        return logits_BDTHW.mean((2, 3, 4))

    def _mixed(self, block: str, x_BCTHW: Tensor) -> Tensor:
        parts = [
            self._unit(f"{block}.Branch_0.Conv3d_0a_1x1", x_BCTHW),
            self._unit(f"{block}.Branch_1.Conv3d_0b_3x3", self._unit(f"{block}.Branch_1.Conv3d_0a_1x1", x_BCTHW)),
            self._unit(f"{block}.Branch_2.Conv3d_0b_3x3", self._unit(f"{block}.Branch_2.Conv3d_0a_1x1", x_BCTHW)),
            self._unit(f"{block}.Branch_3.Conv3d_0b_1x1", _pool(x_BCTHW, (3, 3, 3), (1, 1, 1))),
        ]
        return torch.cat(parts, 1)

    def _unit(self, name: str, x_BCTHW: Tensor, stride: int = 1) -> Tensor:
        """Convolution, batch norm, ReLU."""
        weight = self._tensor(f"{name}.weight")
        kernel: _Size = (weight.shape[2], weight.shape[3], weight.shape[4])
        x_BCTHW = F.conv3d(_pad_same(x_BCTHW, kernel, (stride,) * 3, 0.0), weight, stride=stride)
        mean, var, bias = (self._tensor(f"{name}.{part}") for part in ("mean", "var", "bias"))
        return F.relu(F.batch_norm(x_BCTHW, mean, var, bias=bias, eps=_NORM_EPSILON))

    def _tensor(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))


def _pool(x_BCTHW: Tensor, kernel: _Size, stride: _Size) -> Tensor:
    return F.max_pool3d(_pad_same(x_BCTHW, kernel, stride, float("-inf")), kernel, stride)


def _pad_same(x_BCTHW: Tensor, kernel: _Size, stride: _Size, value: float) -> Tensor:
    padding: list[int] = []
    for size, k, s in reversed(list(zip(x_BCTHW.shape[2:], kernel, stride, strict=True))):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x_BCTHW, padding, value=value) if any(padding) else x_BCTHW
