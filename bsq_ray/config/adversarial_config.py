"""Configuration of the adversarial loss: the discriminator and its losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bsq_ray.config.base import StrictModel

# Smallest side and divisor of the images by frozen network: its smallest feature map has at least 2 x 2 positions.
FEATURE_IMAGE_SIZES = {"alex": (47, 1), "vgg": (32, 1), "dino": (16, 8)}


class AdversarialConfig(StrictModel):
    """The discriminator and its losses (paper section 3; StyleGAN2's R1 penalty every `r1_every` steps)."""

    weight: float = Field(0.1, ge=0, description="Weight of the GAN loss; 0 trains no discriminator.")
    adaptive_weight: bool = Field(
        False, description="Scale the weight by the ratio of gradient norms at the last layer (VQGAN)."
    )
    start_step: int = Field(0, ge=0, description="First step with the discriminator.")
    objective: Literal["non_saturating", "hinge"] = Field("non_saturating", description="The GAN loss.")
    discriminator: Literal["stylegan2", "patchgan", "stylegan2-3d", "features"] = Field(
        "stylegan2",
        description="Network; stylegan2-3d scores whole clips, the others frame by frame. features: heads on the maps "
        "of a frozen network.",
    )
    features: Literal["alex", "vgg", "dino"] = Field(
        "vgg", description="features: the frozen network; alex and vgg are those of LPIPS, dino is DINO ViT-S/8."
    )
    features_weights: str | None = Field(
        None,
        description="features: file with the published weights of dino, a URL or a path that every node has; null for "
        "alex and vgg.",
    )
    channel_base: int = Field(
        32768, ge=64, description="stylegan2 and stylegan2-3d: channels at resolution r are channel_base / r."
    )
    channel_max: int = Field(
        512,
        ge=8,
        description="Most channels: of stylegan2 and stylegan2-3d at any resolution, of any head of features.",
    )
    r1_gamma: float = Field(10.0, ge=0, description="Weight of the R1 gradient penalty on real images.")
    r1_every: int = Field(16, ge=1, description="Steps between R1 penalties, each scaled by this number.")
    r1_gradient: bool = Field(
        True,
        description="Train with the gradient of the R1 penalty; false adds only its value to the loss, as the "
        "published code does by mistake.",
    )
    stddev_group_size: int = Field(
        4,
        ge=1,
        description="stylegan2 and stylegan2-3d: images or clips per group of the minibatch standard deviation, at "
        "most; features: images per group of batch norm; must divide a micro batch.",
    )

    @model_validator(mode="after")
    def _check_dino(self) -> AdversarialConfig:
        if not self.weight or self.discriminator != "features" or self.features != "dino":
            return self
        if not self.features_weights:
            raise ValueError(
                "features dino needs the published weights of DINO ViT-S/8, which no package contains; set "
                "features_weights to the path of dino_deitsmall8_pretrain.pth, or choose vgg or alex"
            )
        if self.r1_gamma and self.r1_gradient:
            raise ValueError(
                "the R1 penalty needs second derivatives, and PyTorch's fused attention, with which features dino is "
                "computed, has none; set r1_gamma to 0, or choose vgg or alex"
            )
        return self
