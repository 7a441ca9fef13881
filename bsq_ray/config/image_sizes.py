"""Checks that the sizes of training images fit the model, the discriminator and LPIPS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bsq_ray.config.adversarial_config import FEATURE_IMAGE_SIZES, AdversarialConfig

if TYPE_CHECKING:
    from bsq_ray.config.tokenizer_config import TokenizerLossConfig, TokenizerModelConfig

# A crop may have so many more or fewer tokens than a square of image_size, as a fraction.
_MAX_TOKEN_DIFFERENCE = 0.05
# Smallest height and width of an image by network of LPIPS: its last feature map then has one pixel.
LPIPS_MIN_SIDES: dict[Literal["alex", "vgg"], int] = {"alex": 31, "vgg": 16}
# Smallest height and width of an image for the discriminator patchgan: it then gives one logit.
_PATCHGAN_MIN_SIDE = 24

CropSizes = tuple[tuple[int, int], ...]


def check_crop_sizes(sizes: CropSizes, model: TokenizerModelConfig, loss: TokenizerLossConfig) -> None:
    """Check heights and widths of training crops; there may be none.

    Raises:
        ValueError: the model or the discriminator takes one size only; a size has no whole patches, is too small for
            LPIPS, or has another number of tokens than a square of `image_size`.
    """
    if not sizes:
        return
    if not model.any_size:
        raise ValueError(
            "data.crop_sizes needs a model for images of any size; set model.position to rotary, or remove them"
        )
    if loss.adversarial.weight and loss.adversarial.discriminator != "patchgan":
        raise ValueError(
            f"the discriminator {loss.adversarial.discriminator} takes squares of image_size only; set "
            "loss.adversarial.discriminator=patchgan, or remove data.crop_sizes"
        )
    min_side = max(LPIPS_MIN_SIDES[name] for name in loss.perceptual_networks) if loss.perceptual_weight else 0
    for height, width in sizes:
        size = f"data.crop_sizes: {height} x {width}"
        if height % model.patch_size or width % model.patch_size:
            raise ValueError(f"{size} is not a multiple of the patches of {model.patch_size} pixels")
        if min(height, width) < min_side:
            raise ValueError(
                f"{size} is too small for LPIPS ({loss.perceptual_network}); choose sides of {min_side} pixels or "
                "more, or set loss.perceptual_weight to 0"
            )
        ratio = height * width / model.image_size**2
        if abs(ratio - 1) > _MAX_TOKEN_DIFFERENCE:
            raise ValueError(
                f"{size} has {ratio:.2f} times the tokens of image_size {model.image_size}; choose sizes with "
                f"{1 - _MAX_TOKEN_DIFFERENCE:g} to {1 + _MAX_TOKEN_DIFFERENCE:g} times, because memory and time of a "
                "step are planned for them"
            )


def check_discriminator_sizes(sizes: CropSizes, image_size: int, adversarial: AdversarialConfig) -> None:
    """Check that the discriminator has logits for images of these sizes, squares of `image_size` if there are none.

    Raises:
        ValueError: they are too small for the discriminator, or no multiple of its network's patches.
    """
    if not adversarial.weight:
        return
    smallest = min(min(size) for size in sizes or ((image_size, image_size),))
    if adversarial.discriminator == "patchgan" and smallest < _PATCHGAN_MIN_SIDE:
        key = "data.crop_sizes has a side of" if sizes else "model.image_size is"
        raise ValueError(
            f"{key} {smallest} pixels, but loss.adversarial.discriminator patchgan needs {_PATCHGAN_MIN_SIDE} or more; "
            "choose a larger size, or set loss.adversarial.weight to 0"
        )
    if adversarial.discriminator == "features":
        min_size, multiple = FEATURE_IMAGE_SIZES[adversarial.features]
        if image_size < min_size or image_size % multiple:
            condition = f"a multiple of {multiple}, at least {min_size}," if multiple > 1 else f"at least {min_size}"
            raise ValueError(
                f"model.image_size {image_size} must be {condition} for loss.adversarial.features "
                f"{adversarial.features}; choose another size, another network, or "
                "loss.adversarial.discriminator=patchgan"
            )
