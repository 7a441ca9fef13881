"""Results that replicas return: files and tokens with their metadata, and measurements.

The ingress imports this module, so it imports no torch: then `/healthz` responds seconds earlier.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import TypedDict

# Media type of .bsq files.
BSQ_MEDIA_TYPE = "application/x-bsq"


@dataclass(frozen=True)
class DecodedPart:
    """The part of a .bsq file that was decoded: all of it, or the first planes of nested bits.

    Attributes:
        num_bits: number of bits per token that were decoded.
        stored_bits: number of bits per token of the file, before it was cut.
        num_bytes: size of this part.
        available_bytes: size of all whole planes in the request.
    """

    num_bits: int
    stored_bits: int
    num_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class MediaFile:
    """An image or video file with its metadata.

    Attributes:
        data: content of the file.
        media_type: value of the header Content-Type.
        num_pixels: number of pixels of the image, or of all frames of the video.
        num_frames: number of frames of a video; None for an image.
        psnr: PSNR with respect to the original in dB, mean over frames; None if there is no original.
        num_bits: number of bits of all tokens; None if the model's bits per pixel hold.
        decoded_part: the part of a .bsq file that it was decoded from; None for other requests.
    """

    data: bytes
    media_type: str
    num_pixels: int
    num_frames: int | None = None
    psnr: float | None = None
    num_bits: int | None = None
    decoded_part: DecodedPart | None = None


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of an image or a video.

    Attributes:
        grid: number of frames, rows and columns of tokens.
        packed: ceil(bits / 8) bytes per token, first bit least significant; tokens in the order frame, row, column.
        rate: frames per second of a video, such as 25 or 30000/1001; None for an image.
    """

    grid: list[int]
    packed: bytes
    rate: str | None = None


class EqualQualityFile(TypedDict):
    """The smallest JPEG or WebP file that is at least as good as the .bsq file.

    `better` is true if even the lowest encoder quality is better.
    """

    bytes: int
    quality: int
    better: bool


class QualityReport(TypedDict):
    """Rate and quality of a compressed image.

    `lpips` is null for an image whose width or height is below 31 pixels, because its network has no output for it.
    `equal` maps metric (`psnr`, `lpips`) and codec (`JPEG`, `WebP`) to a file of equal quality, or to null if not even
    the highest encoder quality is as good or the codec has no files of this size. A metric that is null has no entry.
    """

    width: int
    height: int
    bytes: int
    bits_per_pixel: float
    psnr: float
    lpips: float | None
    equal: dict[str, dict[str, EqualQualityFile | None]]
