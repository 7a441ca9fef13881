"""Discriminators behind one interface: batches of images or clips to one tensor of fp32 logits for each batch.

| `loss.adversarial.discriminator` | input | logits |
|---|---|---|
| `stylegan2` | images (B, 3, H, W) | (B, 1) |
| `stylegan2-3d` | clips (B, 3, T, H, W) | (B, 1) |
| `patchgan` | images (B, 3, H, W) | (B, 1, h, w) |
| `features` | images (B, 3, H, W) | (B, P), positions of all feature maps |

One call may carry several batches, such as real and reconstructed images. The convolutions run on all of them at once;
batch statistics stay inside each batch.
"""

from __future__ import annotations

from torch import nn

from bsq_ray import config
from bsq_ray.models.discriminators.feature_heads import FeatureDiscriminator
from bsq_ray.models.discriminators.patchgan import PatchDiscriminator
from bsq_ray.models.discriminators.stylegan2 import StyleDiscriminator
from bsq_ray.models.discriminators.stylegan2_3d import ClipDiscriminator

__all__ = ["build_discriminator"]


def build_discriminator(adversarial_config: config.AdversarialConfig, image_size: int, frames: int = 1) -> nn.Module:
    """Build the configured discriminator.

    Args:
        image_size: side of the images or frames in pixels.
        frames: frames of a clip; used by `stylegan2-3d` only.

    Raises:
        ValueError: a StyleGAN2 discriminator is configured and the image size is not a power of two, or the weights of
            the frozen network of `features` are not available.
    """
    channel_base, channel_max = adversarial_config.channel_base, adversarial_config.channel_max
    if adversarial_config.discriminator == "patchgan":
        return PatchDiscriminator(channel_max)
    max_group_size = adversarial_config.stddev_group_size
    if adversarial_config.discriminator == "features":
        return FeatureDiscriminator(
            adversarial_config.features,
            adversarial_config.features_weights,
            image_size=image_size,
            channel_max=channel_max,
            max_group_size=max_group_size,
        )
    if adversarial_config.discriminator == "stylegan2-3d":
        return ClipDiscriminator(image_size, frames, channel_base, channel_max, max_group_size)
    return StyleDiscriminator(image_size, channel_base, channel_max, max_group_size)
