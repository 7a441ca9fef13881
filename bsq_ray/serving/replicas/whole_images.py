"""Images at their own size, for tokenizers with local attention: one request at a time.

    image (3, H, W) ─edges replicated to whole patches─▶ tokens of its grid ─▶ pixels of whole patches ─▶ PNG

A token depends on its neighborhood only, so large images are computed in blocks of limited memory. Files are decoded
and encoded in the model's thread too: requests that wait for it hold their files, not their pixels.

Shape suffixes: N tokens of an image, b bytes of a token, L bits of a token, t frames, r rows and c columns of tokens, H
and W pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from bsq_ray.codec.whole_frames import WholeFrameCoder
from bsq_ray.data.transforms import to_float
from bsq_ray.metrics.psnr import psnr
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.serving.deadline import Deadline
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.image_io import open_uploaded_image, png_from_pixels, read_uploaded_image
from bsq_ray.serving.payloads import MediaFile, PackedTokens


class WholeImageEngine:
    """Encodes and decodes images of any size in fp32; only for tokenizers with local attention.

    Args:
        tokenizer: the tokenizer.
        max_pixels: maximum number of pixels of an image.
    """

    def __init__(self, tokenizer: Tokenizer, max_pixels: int) -> None:
        self._bits, self._patch_size, self._max_pixels = (
            tokenizer.quantizer.bits,
            tokenizer.config.patch_size,
            max_pixels,
        )
        self._coder = WholeFrameCoder(tokenizer)

    def count_pixels(self, data: bytes) -> int:
        """Return the number of pixels of an image file in whole patches, from its header.

        Raises:
            ApiError: see `read_uploaded_image`; 413 its patches have too many pixels.
        """
        image = open_uploaded_image(data, self._max_pixels)
        rows, columns = (-(-side // self._patch_size) for side in (image.height, image.width))
        return count_patch_pixels(rows, columns, self._patch_size, self._max_pixels)

    def encode(self, data: bytes, deadline: Deadline) -> PackedTokens:
        """Encode an image file; its right and lower edges are replicated to whole patches.

        Raises:
            ApiError: see `read_uploaded_image`; 503 the deadline passed.
        """
        deadline.check()
        bits_trcL = self._coder.encode(self._read(data)[:, None], deadline.check)
        return PackedTokens(list(bits_trcL.shape[:3]), pack_bits(bits_trcL.flatten(0, 2)).numpy().tobytes())

    def decode(self, tokens: PackedTokens, deadline: Deadline) -> MediaFile:
        """Decode tokens that `count_decoded_pixels` accepts to a PNG of whole patches.

        Raises:
            ApiError: 503 the deadline passed.
        """
        deadline.check()
        _, rows, columns = tokens.grid
        packed_Nb = torch.from_numpy(np.frombuffer(tokens.packed, np.uint8).reshape(rows * columns, -1).copy())
        bits_trcL = unpack_bits(packed_Nb, self._bits).unflatten(0, (1, rows, columns))
        size_hw = rows * self._patch_size, columns * self._patch_size
        return self._png_file(self._coder.decode(bits_trcL, size_hw, deadline.check)[:, 0])

    def reconstruct(self, data: bytes, deadline: Deadline) -> MediaFile:
        """Encode and decode an image file to a PNG of its size.

        Raises:
            ApiError: see `encode`.
        """
        deadline.check()
        original_3HW = self._read(data)
        _, height, width = original_3HW.shape
        bits_trcL = self._coder.encode(original_3HW[:, None], deadline.check)
        reconstructed_3HW = self._coder.decode(bits_trcL, (height, width), deadline.check)[:, 0]
        pair = (to_float(pixels)[None] for pixels in (original_3HW, reconstructed_3HW))
        return self._png_file(reconstructed_3HW, float(psnr(*pair)), bits_trcL.numel())

    def count_decoded_pixels(self, tokens: PackedTokens) -> int:
        """Check the tokens of a request, without PyTorch; return the number of pixels that they decode to.

        Raises:
            ApiError: 422 the tokens do not match this model, 413 the image has too many pixels.
        """
        frames, rows, columns = tokens.grid
        bytes_per_token = -(-self._bits // 8)
        if frames != 1 or min(rows, columns) < 1 or len(tokens.packed) != rows * columns * bytes_per_token:
            raise ApiError(
                422,
                "the tokens do not match this model; it expects grid [1, rows, columns] and for each token "
                f"{bytes_per_token} bytes",
            )
        return count_patch_pixels(rows, columns, self._patch_size, self._max_pixels)

    def _read(self, data: bytes) -> torch.Tensor:
        """Decode an image file to uint8 pixels (3, H, W)."""
        return torch.from_numpy(np.array(read_uploaded_image(data, self._max_pixels))).permute(2, 0, 1)

    def _png_file(
        self, pixels_3HW: torch.Tensor, psnr_db: float | None = None, num_bits: int | None = None
    ) -> MediaFile:
        num_pixels = pixels_3HW[0].numel()
        return MediaFile(png_from_pixels(pixels_3HW.numpy()), "image/png", num_pixels, psnr=psnr_db, num_bits=num_bits)


def count_patch_pixels(rows: int, columns: int, patch_size: int, max_pixels: int) -> int:
    """Return the pixels of the patches of an image or frame.

    The last row and column may extend beyond the original. Patches have many times the pixels of an original of a few
    rows or columns, so they have a limit, too.

    Raises:
        ApiError: 413, the original had more than `max_pixels`, or its patches have more than twice as many.
    """
    min_height, min_width = ((length - 1) * patch_size + 1 for length in (rows, columns))
    if min_height * min_width > max_pixels:
        raise ApiError(413, f"the image has at least {min_height * min_width} pixels, more than {max_pixels}")
    num_pixels = rows * columns * patch_size**2
    if num_pixels > 2 * max_pixels:
        raise ApiError(
            413, f"the patches of the image have {num_pixels} pixels, more than twice the limit of {max_pixels}"
        )
    return num_pixels
