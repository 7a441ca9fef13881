"""Discriminator on the feature maps of a frozen network (Sauer et al., "StyleGAN-T", ICML 2023, section 3.2).

    images ─frozen network─▶ 5 maps, each ─▶ conv 1 ─ norm ─ leaky ReLU ─▶ + [ conv 9 ─ norm ─ leaky ReLU ] ─▶ conv 1
    ─▶ one logit for each position of each map

Convolutions run over the sequence of a map's positions and have spectral norm.

Shape suffixes: B images, C channels, H and W pixels, P positions of a map, g images of a group, M groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from bsq_ray.config.batch_split import stddev_group_size
from bsq_ray.models.dino_network import DINO_TAPS, DINO_WIDTH, DINONetwork
from bsq_ray.models.lpips_network import LPIPSNetwork

FeatureName = Literal["alex", "vgg", "dino"]
_LEAKY_RELU_SLOPE = 0.2
_KERNEL_SIZE = 9
# Channels of the five feature maps.
_MAP_CHANNELS: dict[FeatureName, tuple[int, ...]] = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "dino": (DINO_WIDTH,) * (1 + len(DINO_TAPS)),
}


class SpectralConv(nn.Conv1d):
    """1-D convolution with circular padding whose weights are divided by their spectral norm (Miyato et al., 2018).

    The forward pass does not update the estimate of the spectral norm, because it would then depend on the number of
    passes; `update_norm` does.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias)
        spectral_norm(self)

    def forward(self, x_BCP: Tensor) -> Tensor:
        """Convolve (B, C_in, P) to (B, C_out, P)."""
        # Autocast would round the norm to bf16.
        with torch.autocast(x_BCP.device.type, enabled=False):
            weight = self.weight
        margin = self.kernel_size[0] // 2
        if margin:
            x_BCP = F.pad(x_BCP, (margin, margin), mode="circular")
        return F.conv1d(x_BCP, weight, self.bias)

    def train(self, mode: bool = True) -> SpectralConv:
        """Set the mode of the layer; that of its spectral norm stays evaluation."""
        super().train(mode)
        self.get_submodule("parametrizations").eval()
        return self

    @torch.no_grad()
    def update_norm(self) -> None:
        """Take one step of the power iteration that estimates the spectral norm."""
        norm, weight = self.get_submodule("parametrizations.weight.0"), self.get_parameter(_ORIGINAL)
        with torch.autocast(weight.device.type, enabled=False):
            # Without hooks: those of ZeRO-3 would partition the weight.
            norm.train().forward(weight)
        norm.eval()


# Name of the weight before normalization.
_ORIGINAL = "parametrizations.weight.original"


class VirtualBatchNorm(nn.Module):
    """Batch norm over groups of images and their positions, without running statistics.

    Group i contains the images i, i + M, i + 2M, …, as in `append_minibatch_stddev`.

    Args:
        max_group_size: the group size is the largest divisor of B up to this.
    """

    def __init__(self, channels: int, max_group_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.max_group_size = max_group_size

    def forward(self, x_BCP: Tensor, batch_sizes: Sequence[int]) -> Tensor:
        """Normalize (B, C, P), in which batches of these sizes follow each other."""
        return torch.cat([self._normalize(part_BCP) for part_BCP in x_BCP.split(batch_sizes)])

    def _normalize(self, x_BCP: Tensor) -> Tensor:
        group_size = stddev_group_size(len(x_BCP), self.max_group_size)
        num_groups = len(x_BCP) // group_size
        # Each channel of each group is a channel of its own.
        grouped = x_BCP.reshape(group_size, -1, x_BCP.shape[2])
        weight, bias = self.weight.repeat(num_groups), self.bias.repeat(num_groups)
        return F.batch_norm(grouped, None, None, weight, bias, training=True).view(x_BCP.shape)


class FeatureHead(nn.Module):
    """Maps the positions of one feature map to logits.

    Args:
        in_channels: channels of the feature map.
        channels: channels of the head.
        max_group_size: see `VirtualBatchNorm`.
    """

    def __init__(self, in_channels: int, channels: int, max_group_size: int) -> None:
        super().__init__()
        # Batch norm subtracts what a bias adds.
        self.conv0 = SpectralConv(in_channels, channels, 1, bias=False)
        self.norm0 = VirtualBatchNorm(channels, max_group_size)
        self.conv1 = SpectralConv(channels, channels, _KERNEL_SIZE, bias=False)
        self.norm1 = VirtualBatchNorm(channels, max_group_size)
        self.out = SpectralConv(channels, 1, 1)

    def forward(self, x_BCP: Tensor, batch_sizes: Sequence[int]) -> Tensor:
        """Map (B, C_in, P), in which batches of these sizes follow each other, to logits (B, P)."""
        x_BCP = F.leaky_relu(self.norm0(self.conv0(x_BCP), batch_sizes), _LEAKY_RELU_SLOPE, inplace=True)
        branch_BCP = F.leaky_relu(self.norm1(self.conv1(x_BCP), batch_sizes), _LEAKY_RELU_SLOPE, inplace=True)
        return cast(Tensor, self.out((x_BCP + branch_BCP) / sqrt(2)).squeeze(1))


class FeatureDiscriminator(nn.Module):
    """One head for each of five feature maps of a frozen network, with one logit for each position.

    The frozen network is not a submodule: it is not among parameters, buffers and state dict. It follows `to`, stays in
    evaluation mode, and passes gradients to the images.

    Args:
        features: "alex" or "vgg", the networks of LPIPS, or "dino", ViT-S/8.
        features_weights: file with the weights of "dino", otherwise not used.
        image_size: side of the images in pixels.
        channel_max: upper bound of the channels of the heads.
        max_group_size: see `VirtualBatchNorm`.

    Raises:
        ValueError: the weights of the frozen network are not available.
    """

    def __init__(
        self,
        features: FeatureName,
        features_weights: str | None,
        *,
        image_size: int,
        channel_max: int,
        max_group_size: int = 4,
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            FeatureHead(channels, min(channels, channel_max), max_group_size) for channels in _MAP_CHANNELS[features]
        )
        # Pretrained weights are on the CPU, whatever the default device is.
        with torch.device("cpu"):
            network = _build_network(features, features_weights, image_size)
        # Modules in a tuple are not submodules.
        self._frozen = (network,)
        self.train()

    @property
    def frozen_network(self) -> LPIPSNetwork | DINONetwork:
        """The network that computes the feature maps."""
        return self._frozen[0]

    def forward(self, *batches_BCHW: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Return fp32 logits (B, P) of each head, for each batch of images (B, 3, H, W) in [-1, 1]."""
        batch_sizes = [len(batch) for batch in batches_BCHW]
        maps = self.frozen_network.feature_maps(torch.cat(batches_BCHW))
        logits = []
        for head, map_BCHW in zip(self.heads, maps, strict=True):
            logits_BP = head(map_BCHW.flatten(2), batch_sizes)
            # At least fp32: a copy of the module in fp64 keeps its precision.
            logits_BP = logits_BP.to(torch.promote_types(logits_BP.dtype, torch.float32))
            logits.append(logits_BP.split(batch_sizes))
        return tuple(zip(*logits, strict=True))

    def update_spectral_norms(self) -> None:
        """Take one step of the power iterations that estimate the spectral norms; once per training step.

        The estimates are then the same for any number of workers and micro batches.
        """
        for module in self.modules():
            if isinstance(module, SpectralConv):
                module.update_norm()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureDiscriminator:
        """Apply what `to`, `double` and others do to the frozen network, too."""
        self._frozen = (self._frozen[0]._apply(fn, recurse),)
        return super()._apply(fn, recurse)


def _build_network(features: FeatureName, url: str | None, image_size: int) -> LPIPSNetwork | DINONetwork:
    if features == "dino":
        assert url is not None  # AdversarialConfig checks it.
        return DINONetwork(url, image_size)
    return LPIPSNetwork(features)
