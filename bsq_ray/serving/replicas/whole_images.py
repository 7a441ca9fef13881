"""Images at their own size, for tokenizers with local attention: one request at a time, between batches of others.

    image (3, H, W) ─edges replicated to whole patches─▶ tokens of its grid ─▶ pixels of whole patches

A token depends on its neighborhood only, so large images are computed in blocks of limited memory.

Shape suffixes: N tokens of an image, b bytes of a token, L bits of a token, R and C rows and columns of tokens, H and W
pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from bsq_ray.codec.pixel_codec import build_pixel_codec
from bsq_ray.codec.rect import Rect
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.serving.deadline import Deadline
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.image_io import read_uploaded_image
from bsq_ray.serving.payloads import PackedTokens


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
        # Tiles of one token: an image is padded to whole patches only.
        self._pixel_codec = build_pixel_codec(tokenizer, torch.float32, None, grid_size=1)

    def prepare(self, data: bytes) -> np.ndarray:
        """Decode an image file to uint8 pixels (3, H, W).

        Raises:
            ApiError: see `read_uploaded_image`.
        """
        return np.asarray(read_uploaded_image(data, self._max_pixels)).transpose(2, 0, 1)

    def encode(self, pixels_3HW: np.ndarray, deadline: Deadline) -> PackedTokens:
        """Encode pixels; their right and lower edges are replicated to whole patches.

        Raises:
            ApiError: 503 the deadline passed.
        """
        _, height, width = pixels_3HW.shape
        grid = Rect(0, 0, height, width).cover(self._patch_size)
        pixels_3THW = torch.from_numpy(pixels_3HW.copy())[:, None]
        bits_RCNL = self._pixel_codec.encode_tiles(pixels_3THW, grid, deadline.check)
        return PackedTokens([1, grid.height, grid.width], pack_bits(bits_RCNL.flatten(0, 2)).numpy().tobytes())

    def decode(self, tokens: PackedTokens, deadline: Deadline) -> np.ndarray:
        """Decode tokens to uint8 pixels (3, H, W) of whole patches.

        Raises:
            ApiError: 422 the tokens do not match this model, 413 the image has too many pixels, 503 the deadline
                passed.
        """
        bits_RCNL = self._parse(tokens)
        rows, columns = bits_RCNL.shape[:2]
        region = Rect(0, 0, rows * self._patch_size, columns * self._patch_size)
        available_RC = torch.ones(rows, columns, dtype=torch.bool)
        pixels_3THW = self._pixel_codec.decode_region(bits_RCNL, available_RC, 1, region, deadline.check)
        return pixels_3THW[:, 0].numpy()

    def _parse(self, tokens: PackedTokens) -> torch.Tensor:
        """Return the bits (R, C, 1, L) of the tokens of a request."""
        frames, rows, columns = tokens.grid
        bytes_per_token = -(-self._bits // 8)
        if frames != 1 or min(rows, columns) < 1 or len(tokens.packed) != rows * columns * bytes_per_token:
            raise ApiError(
                422,
                "the tokens do not match this model; it expects grid [1, rows, columns] and for each token "
                f"{bytes_per_token} bytes",
            )
        num_pixels = rows * columns * self._patch_size**2
        if num_pixels > self._max_pixels:
            raise ApiError(413, f"the image has {num_pixels} pixels, more than {self._max_pixels}")
        packed_Nb = torch.from_numpy(np.frombuffer(tokens.packed, np.uint8).reshape(-1, bytes_per_token).copy())
        return unpack_bits(packed_Nb, self._bits).unflatten(0, (rows, columns))[:, :, None]
