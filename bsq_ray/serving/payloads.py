"""What replicas answer: files and tokens, with what is to be said of them."""

from __future__ import annotations

from dataclasses import dataclass

# Media type of .bsq files.
BSQ_MEDIA_TYPE = "application/x-bsq"


@dataclass(frozen=True)
class MediaFile:
    """A file.

    Attributes:
        media_type: of HTTP.
        pixels: that it shows, of all frames.
        frames: of a clip; None for an image.
        psnr: of what it shows, mean over frames, dB; None where nothing is compared.
    """

    data: bytes
    media_type: str
    num_pixels: int
    num_frames: int | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of an image or a clip.

    Attributes:
        grid: frames, rows, columns.
        packed: for each token ceil(bits / 8) bytes, bit 1 least significant; frames slowest.
        rate: frames per second of a clip, such as 25 or 30000/1001; None for an image.
    """

    grid: list[int]
    packed: bytes
    rate: str | None = None
