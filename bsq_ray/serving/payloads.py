"""Results of replicas: files and tokens, with their metadata."""

from __future__ import annotations

from dataclasses import dataclass

# Media type of .bsq files.
BSQ_MEDIA_TYPE = "application/x-bsq"


@dataclass(frozen=True)
class MediaFile:
    """A file.

    Attributes:
        media_type: value of the header Content-Type.
        num_pixels: pixels of the image, or of all frames of the video.
        num_frames: frames of a video; None for an image.
        psnr: PSNR against the original in dB, mean over frames; None without an original.
    """

    data: bytes
    media_type: str
    num_pixels: int
    num_frames: int | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of an image or a video.

    Attributes:
        grid: frames, rows, columns.
        packed: ceil(bits / 8) bytes per token, bit 1 least significant, frames slowest.
        rate: frames per second of a video, such as 25 or 30000/1001; None for an image.
    """

    grid: list[int]
    packed: bytes
    rate: str | None = None
