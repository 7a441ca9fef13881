"""The Inception network of FID ("2015-12-05"), in plain torch with its published weights.

It is torchvision's Inception v3 with three changes that the published graph has: average pools leave padding out of
their mean, the last block pools by maximum, and the input is resized to 299 x 299 without aligned corners.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray.metrics.pretrained_weights import resolve_once
from bsq_ray.metrics.torchvision_stub import stub_torchvision_ops

NUM_FEATURES = 2048


class Inception(nn.Module):
    """Images to the 2048 features of the last pooling layer.

    Raises:
        ValueError: the published weights are not to be had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = _build_network()
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """RGB in [-1, 1] of any size to fp32 (B, 2048)."""
        x_BCHW = F.interpolate(images_BCHW.float(), (299, 299), mode="bilinear", align_corners=False)
        net = self.network
        for name in _STEM:
            x_BCHW = getattr(net, name)(x_BCHW)
        for name in _BLOCKS:
            x_BCHW = getattr(net, name)(x_BCHW)
        return x_BCHW.mean((2, 3))


_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2")
_BLOCKS = (
    "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
    "Mixed_7a", "Mixed_7b", "Mixed_7c",
)  # fmt: skip


def _build_network() -> nn.Module:
    stub_torchvision_ops()
    from torchvision.models import inception
    from torchvision.models.inception import Inception3

    net = Inception3(aux_logits=False, init_weights=False)
    weights = resolve_once("fid-inception").tensors
    layers = [module for module in net.modules() if isinstance(module, inception.BasicConv2d)]
    assert 4 * len(layers) == len(weights)
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.conv.weight.copy_(weights[f"conv.{number}.weight"])
            layer.bn.weight.fill_(1)
            layer.bn.bias.copy_(weights[f"conv.{number}.bias"])
            cast(Tensor, layer.bn.running_mean).copy_(weights[f"conv.{number}.mean"])
            cast(Tensor, layer.bn.running_var).copy_(weights[f"conv.{number}.var"])
    for name in _BLOCKS:
        block = getattr(net, name)
        if hasattr(block, "branch_pool"):
            block.branch_pool = nn.Sequential(_MaxPool() if name == "Mixed_7c" else _AveragePool(), block.branch_pool)
            block.forward = _forward_with_branch_pool(block)
    return cast(nn.Module, net)


class _AveragePool(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


class _MaxPool(nn.Module):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)


def _forward_with_branch_pool(block: Any) -> Any:
    """The block's forward pass, with the pool that now stands in `branch_pool` instead of the one written in it."""
    kind = type(block).__name__

    def forward(x_BCHW: Tensor) -> Tensor:
        if kind == "InceptionA":
            parts = [
                block.branch1x1(x_BCHW),
                block.branch5x5_2(block.branch5x5_1(x_BCHW)),
                block.branch3x3dbl_3(block.branch3x3dbl_2(block.branch3x3dbl_1(x_BCHW))),
            ]
        elif kind == "InceptionC":
            doubled = block.branch7x7dbl_3(block.branch7x7dbl_2(block.branch7x7dbl_1(x_BCHW)))
            parts = [
                block.branch1x1(x_BCHW),
                block.branch7x7_3(block.branch7x7_2(block.branch7x7_1(x_BCHW))),
                block.branch7x7dbl_5(block.branch7x7dbl_4(doubled)),
            ]
        else:
            single, doubled = block.branch3x3_1(x_BCHW), block.branch3x3dbl_2(block.branch3x3dbl_1(x_BCHW))
            parts = [
                block.branch1x1(x_BCHW),
                block.branch3x3_2a(single),
                block.branch3x3_2b(single),
                block.branch3x3dbl_3a(doubled),
                block.branch3x3dbl_3b(doubled),
            ]
        return torch.cat([*parts, block.branch_pool(x_BCHW)], 1)

    return forward
