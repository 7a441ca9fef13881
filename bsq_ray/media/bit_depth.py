"""Reduction of gray images with more than 8 bits to 8, scaled by the type of their values.

    12 or 16 bits, unsigned     white is the largest value of the type, as the file states it
    16 bits, signed             white is 32767
    32-bit integers and floats  have no defined white: it is the smallest of 1 (floats only), 255, 65535 and the largest
                                integer of the type that no value exceeds

Negative values, values that are not finite, and floats above 65535 are errors.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from bsq_ray.media.decode_error import DecodeError

_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_TIFF_WHITE_IS_ZERO, _TIFF_UNSIGNED = 0, 1


def is_deep(image: Image.Image) -> bool:
    """Return True if the image has gray values of more than 8 bits."""
    return image.mode in ("I", "F") or _is_16_bits(image)


def _is_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a loaded image for which `is_deep` is True to mode L, or to LA if one value is transparent.

    Raises:
        DecodeError: the values have no defined white, see the module.
    """
    values_HW = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0])
    if image.mode == "I" and bits == 32 and int(tags.get(_TIFF_SAMPLE_FORMAT, (0,))[0]) == _TIFF_UNSIGNED:
        values_HW = values_HW.view(np.uint32)
    gray_HW = (values_HW / _white(image, values_HW, bits) * 255).round().clip(0, 255).astype(np.uint8)
    if _is_16_bits(image) and tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        gray_HW = 255 - gray_HW
    gray = Image.fromarray(gray_HW)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray = gray.convert("LA")
        gray.putalpha(Image.fromarray(np.where(values_HW == key, 0, 255).astype(np.uint8)))
    return gray


def _white(image: Image.Image, values_HW: np.ndarray, bits: int) -> float:
    """Return the value that is displayed as white."""
    if _is_16_bits(image):
        return float(2**bits - 1)
    low, high = float(values_HW.min()), float(values_HW.max())
    # A sum also finds values that comparisons skip.
    if not np.isfinite(low + high) or low < 0:
        raise DecodeError(f"its values reach from {low:g} to {high:g}; convert it to 8 or 16 bits")
    if image.mode == "I" and (image.format in ("PNG", "PPM") or (image.format == "TIFF" and bits == 16)):
        return 32767.0 if image.format == "TIFF" else 65535.0
    largest = 65535.0 if image.mode == "F" else float(np.iinfo(values_HW.dtype).max)
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0, largest)
    white = next((white for white in whites if high <= white), None)
    if white is None:
        raise DecodeError(f"its values reach {high:g}; scale them to 0 to 1, or convert it to 8 or 16 bits")
    return white
