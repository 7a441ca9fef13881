"""Configuration of the adversarial loss: the discriminator and its losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bsq_ray.config.base import StrictModel


class AdversarialConfig(StrictModel):
    """The discriminator and its losses (paper section 3; StyleGAN2's R1 penalty every `r1_every` steps)."""

    weight: float = Field(0.1, ge=0, description="Weight of the GAN loss; 0 trains no discriminator.")
    adaptive_weight: bool = Field(
        False, description="Scale the weight by the ratio of gradient norms at the last layer (VQGAN)."
    )
    start_step: int = Field(0, ge=0, description="First step with the discriminator.")
    objective: Literal["non_saturating", "hinge"] = Field("non_saturating", description="The GAN loss.")
    discriminator: Literal["stylegan2", "patchgan", "stylegan2-3d"] = Field(
        "stylegan2", description="Network; stylegan2 and patchgan score clips frame by frame, stylegan2-3d whole clips."
    )
    channel_base: int = Field(
        32768, ge=64, description="stylegan2 and stylegan2-3d: channels at resolution r are channel_base / r."
    )
    channel_max: int = Field(512, ge=8, description="stylegan2 and stylegan2-3d: most channels at any resolution.")
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
        "most; must divide a micro batch.",
    )
