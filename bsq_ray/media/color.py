"""What the values of pixels mean: images become sRGB, clips keep what their source says of itself."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image, ImageCms


class Color(NamedTuple):
    """Code points of ITU-T H.273, and whether all 256 values of a source are used (1) or 16 to 235 (0)."""

    primaries: int
    transfer: int
    matrix: int
    full_range: int


SRGB = Color(1, 13, 0, 1)


def to_srgb(image: Image.Image) -> Image.Image:
    """RGB with 8 bits a channel, upright, transparency on white; an embedded profile's colours become those of sRGB."""
    # Here, so that what knows colours only loads no PyTorch.
    from bsq_ray.data.transforms import to_rgb

    profile, mode = image.info.get("icc_profile"), image.mode
    rgb = to_rgb(image)
    if not profile or mode not in ("RGB", "RGBA", "P"):
        return rgb
    try:
        source_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source_profile.profile.xcolor_space.strip() != "RGB":
            return rgb
        converted = ImageCms.profileToProfile(rgb, source_profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        # A profile that nobody can read says nothing about the colours.
        return rgb
    assert converted is not None
    return converted
