"""Published results on ImageNet, COCO and UCF-101, copied from papers and not reproduced with this code.

PSNR depends on the resize filter by more than 2 dB, so compare only rows with the same filter. The ViT-VQGAN row is
copied from the ViT-VQGAN paper. For 18-bit BSQ-ViT on COCO, a later paper reports an rFID of 2.85.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """Row of a published table of image tokenizers; None marks a value that was not reported.

    Attributes:
        method: name in the paper.
        data: data set and resolution.
        resize_filter: filter that resized the images.
        bits: bits per token.
        psnr: in dB.
        rfid: FID between originals and reconstructions.
    """

    method: str
    data: str
    resize_filter: str
    bits: int
    psnr: float | None
    ssim: float | None
    lpips: float | None
    rfid: float | None


_IMAGENET, _COCO = "ImageNet val 256", "COCO val 2017 256"

IMAGE_ROWS = (
    PublishedResult("SDXL-VAE", _IMAGENET, "lanczos", 64, 25.38, 0.7276, 0.0666, 0.72),
    PublishedResult("SD-VAE 2.x", _IMAGENET, "lanczos", 64, None, None, None, 0.78),
    PublishedResult("DALL-E dVAE", _IMAGENET, "lanczos", 13, None, None, None, 36.84),
    PublishedResult("ViT-VQGAN", _IMAGENET, "not stated", 13, None, None, None, 1.55),
    PublishedResult("MaskGIT (p = 16)", _IMAGENET, "lanczos", 10, None, None, None, 2.23),
    PublishedResult("BSQ-ViT, no approximation", _IMAGENET, "lanczos", 18, 24.79, 0.7319, 0.0836, 1.34),
    PublishedResult("BSQ-ViT, EMA, no approximation", _IMAGENET, "lanczos", 18, 24.80, 0.7314, 0.0820, 1.23),
    PublishedResult("BSQ-ViT", _IMAGENET, "lanczos", 18, 25.36, 0.7578, 0.0761, 1.14),
    PublishedResult("BSQ-ViT, EMA", _IMAGENET, "lanczos", 18, 25.80, 0.7680, 0.0729, 1.30),
    PublishedResult("BSQ-ViT", _IMAGENET, "lanczos", 36, 27.88, 0.8410, 0.0432, 0.41),
    PublishedResult("BSQ-ViT, EMA", _IMAGENET, "lanczos", 36, 28.14, 0.8448, 0.0400, 0.45),
    PublishedResult("SDXL-VAE", _IMAGENET, "bilinear", 64, 27.37, 0.7814, None, 0.67),
    PublishedResult("BSQ-ViT", _IMAGENET, "bilinear", 18, 27.78, 0.8171, None, 0.99),
    PublishedResult("BSQ-ViT", _IMAGENET, "bilinear", 36, 30.12, 0.8803, 0.0355, 0.36),
    PublishedResult("SDXL-VAE", _COCO, "lanczos", 64, None, None, None, 4.23),
    PublishedResult("BSQ-ViT", _COCO, "lanczos", 18, 25.08, 0.7662, 0.0744, 5.81),
    PublishedResult("BSQ-ViT", _COCO, "lanczos", 36, 27.64, 0.8485, 0.0412, 3.42),
    PublishedResult("BSQ-ViT, EMA", _COCO, "lanczos", 36, 27.92, 0.8526, 0.0380, 3.34),
)


@dataclass(frozen=True)
class PublishedVideoResult:
    """Row of the published UCF-101 table (16-frame clips at 128 px); None marks a value that was not reported.

    Attributes:
        method: name in the paper.
        split: split of UCF-101 that is reconstructed, "train" or "test".
        bits: bits per token.
        psnr: in dB.
        rfvd: FVD between originals and reconstructions.
    """

    method: str
    split: str
    bits: int | None
    psnr: float | None
    ssim: float | None
    lpips: float | None
    rfvd: float


VIDEO_ROWS = (
    PublishedVideoResult("MaskGIT", "train", None, None, None, None, 216),
    PublishedVideoResult("TATS", "train", None, None, None, None, 162),
    PublishedVideoResult("MAGVIT-L", "train", 10, 22.0, 0.7010, 0.0990, 25),
    PublishedVideoResult("MAGVIT-v2", "train", 18, None, None, 0.0694, 16.12),
    PublishedVideoResult("MAGVIT-v2, deeper", "train", 18, None, None, 0.0537, 8.62),
    PublishedVideoResult("BSQ-ViT, image model frame by frame", "train", 18, 25.86, 0.8273, 0.1089, 326),
    PublishedVideoResult("BSQ-ViT, image model frame by frame", "test", 18, None, None, None, 342),
    PublishedVideoResult("BSQ-ViT, not causal", "train", 18, None, None, None, 7.34),
    PublishedVideoResult("BSQ-ViT, not causal", "test", 18, None, None, None, 10.57),
    PublishedVideoResult("BSQ-ViT, block-causal", "train", 18, 32.08, 0.9421, 0.0244, 8.08),
    PublishedVideoResult("BSQ-ViT, block-causal", "test", 18, None, None, None, 11.62),
    PublishedVideoResult("BSQ-ViT, block-causal", "train", 36, 33.80, 0.9606, 0.0159, 4.10),
    PublishedVideoResult("BSQ-ViT, block-causal", "test", 36, 33.55, 0.9588, 0.0167, 6.21),
)


def published_markdown(kind: str = "images") -> str:
    """Return the published results for "images" or "videos" as a Markdown table."""
    if kind == "videos":
        return _format_table(
            ("published", "UCF-101 split", "bits", "PSNR", "SSIM", "LPIPS", "rFVD"),
            [(row.method, row.split, row.bits, row.psnr, row.ssim, row.lpips, row.rfvd) for row in VIDEO_ROWS],
        )
    return _format_table(
        ("published", "data", "filter", "bits", "PSNR", "SSIM", "LPIPS", "rFID"),
        [
            (row.method, row.data, row.resize_filter, row.bits, row.psnr, row.ssim, row.lpips, row.rfid)
            for row in IMAGE_ROWS
        ],
    )


def _format_table(header: tuple[str, ...], rows: list[tuple[str | float | None, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        cells = ("–" if cell is None else cell if isinstance(cell, str) else f"{cell:g}" for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
