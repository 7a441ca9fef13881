"""Results that replicas return: files and tokens, with their metadata."""

from __future__ import annotations

from dataclasses import dataclass

# Media type of .bsq files.
BSQ_MEDIA_TYPE = "application/x-bsq"


@dataclass(frozen=True)
class MediaFile:
    """An image or video file with its metadata.

    Attributes:
        data: content of the file.
        media_type: value of the header Content-Type.
        num_pixels: number of pixels of the image, or of all frames of the video.
        num_frames: number of frames of a video; None for an image.
        psnr: PSNR with respect to the original in dB, mean over frames; None if there is no original.
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
        grid: number of frames, rows and columns of tokens.
        packed: ceil(bits / 8) bytes per token, first bit least significant; tokens in the order frame, row, column.
        rate: frames per second of a video, such as 25 or 30000/1001; None for an image.
    """

    grid: list[int]
    packed: bytes
    rate: str | None = None
