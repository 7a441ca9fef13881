"""Conversion from embedded color profiles (ICC) to sRGB, by LittleCMS.

Relative colorimetric with black point compensation. A profile that is broken, or that is not one of the image's colors
(such as a CMYK profile in an RGB image), gives no information about them and is ignored.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_COLOR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_INTENTS = (ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Intent.PERCEPTUAL)
# Profiles that change no sample color by more levels than this are sRGB: their images keep exact pixels.
_MAX_SRGB_DEVIATION, _SAMPLES_PER_CHANNEL = 1, 16


def to_srgb_colors(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an opaque image to RGB in sRGB.

    Args:
        image: mode RGB, L, CMYK or LAB.
        profile: content of the embedded profile; None for images without one, which are taken as sRGB.
    """
    transform = _srgb_transform(profile, image.mode) if profile or image.mode == "LAB" else None
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(16)
def _srgb_transform(profile: bytes | None, mode: str) -> Any:
    """Return the transform (`ImageCms.ImageCmsTransform`); None for sRGB and for profiles that are ignored."""
    try:
        if mode == "LAB":
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
            if source.profile.xcolor_space.strip() != _COLOR_SPACES[mode]:
                return None
    except Exception:
        return None
    destination = ImageCms.createProfile("sRGB")
    for intent in _INTENTS:
        try:
            transform = ImageCms.buildTransform(
                source, destination, mode, "RGB", intent, ImageCms.Flags.BLACKPOINTCOMPENSATION
            )
            return None if _is_identity(transform, mode) else transform
        except Exception:
            # A profile may lack the tables of an intent.
            continue
    return None


def _is_identity(transform: Any, mode: str) -> bool:
    if mode not in ("RGB", "L"):
        return False
    levels = np.linspace(0, 255, _SAMPLES_PER_CHANNEL).round().astype(np.uint8)
    if mode == "L":
        samples = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(_SAMPLES_PER_CHANNEL, -1, 3)
        samples = Image.fromarray(grid)
    converted = ImageCms.applyTransform(samples, transform)
    assert converted is not None
    deviation = np.abs(np.asarray(converted, int) - np.asarray(samples.convert("RGB"), int)).max()
    return bool(deviation <= _MAX_SRGB_DEVIATION)
