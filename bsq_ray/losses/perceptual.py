"""LPIPS (Zhang et al., CVPR 2018) with its published networks, as a loss and as the base of the metric."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bsq_ray.metrics.pretrained_weights import resolve_once
from bsq_ray.metrics.torchvision_stub import stub_torchvision_ops


class PerceptualLoss(nn.Module):
    """Distance between the deep features of two images.

    The network is frozen: it takes no gradients for its weights, and images that need none cost only a forward pass.

    Args:
        network: "vgg" (the paper's training loss) or "alex" (the usual metric).

    Raises:
        ValueError: the network's published weights are not to be had.
    """

    def __init__(self, network: Literal["vgg", "alex"]) -> None:
        super().__init__()
        self.lpips = _build(network)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in evaluation mode: its dropout is part of how the heads were made, not of the distance."""
        return super().train(False)

    def features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Features of images in [-1, 1] at the five layers, each of unit length along the channels."""
        scaled_BCHW = self.lpips.scaling_layer(images_BCHW).contiguous(memory_format=torch.channels_last)
        # Half precision features are normalised in fp32: their squares overflow the mantissa.
        return [_normalize(layer.float()) for layer in self.lpips.net(scaled_BCHW)]

    def forward(self, reconstruction_BCHW: Tensor, original_BCHW: Tensor) -> Tensor:
        """LPIPS of each pair, fp32 (B,). The original's features are computed without gradients."""
        with torch.no_grad():
            original_features = self.features(original_BCHW)
        distance_B = reconstruction_BCHW.new_zeros(len(reconstruction_BCHW), dtype=torch.float32)
        for original, reconstructed, head in zip(
            original_features, self.features(reconstruction_BCHW), self.lpips.lins, strict=True
        ):
            weight_C = cast(Tensor, head.model[-1].weight).flatten()
            # A product of matrices would be rounded to bf16 under autocast.
            distance_B = distance_B + ((reconstructed - original).square().mean((2, 3)) * weight_C).sum(1)
        return distance_B


def _normalize(features_BCHW: Tensor) -> Tensor:
    return features_BCHW / (features_BCHW.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _build(network: str) -> Any:
    stub_torchvision_ops()
    import warnings

    import lpips

    weights = resolve_once(f"lpips-{network}").tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecated spelling inside the package
        model = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    convolutions = [module for module in model.net.modules() if isinstance(module, nn.Conv2d)]
    assert 2 * len(convolutions) == len(weights)
    with torch.no_grad():
        for index, convolution in enumerate(convolutions):
            convolution.weight.copy_(weights[f"conv.{index}.weight"])
            cast(Tensor, convolution.bias).copy_(weights[f"conv.{index}.bias"])
    return model.to(memory_format=torch.channels_last)
