"""Coders of the groups of one file: tokens to groups, and groups to a file.

    GroupFileCoder   all bits of a token, one payload per group
    PlaneFileCoder   nested bits: planes of leading bits, and the rate that reaches a target

Shape suffixes: B tiles of a group, N tokens of a tile, L bits of a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bsq_ray.codec.entropy_coding import TokenEncoder
from bsq_ray.codec.frame_encoder import CompressedFile, build_file, build_plane_file
from bsq_ray.codec.header import Header, TokenFormat
from bsq_ray.codec.plane_groups import BitRange, encode_planes
from bsq_ray.codec.plane_index import EncodedPlane
from bsq_ray.codec.rate import PlaneLayout, Rate
from bsq_ray.codec.tile_groups import EncodedGroup, encode_group
from bsq_ray.metrics.lpips import MIN_SIDE, lpips

EncodedT = TypeVar("EncodedT")


class FileCoder(ABC, Generic[EncodedT]):
    """Encodes the groups of one file."""

    def __init__(self, token_format: TokenFormat, timings_s: dict[str, float]) -> None:
        self._token_format, self._timings_s = token_format, timings_s
        self._groups: list[EncodedT] = []

    @abstractmethod
    def encode(self, bits_BNL: Tensor) -> EncodedT:
        """Encode the tokens of a group."""

    def add(self, groups: Sequence[EncodedT]) -> None:
        """Append encoded groups to the file."""
        self._groups += groups

    @abstractmethod
    def finish(self, header: Header) -> CompressedFile:
        """Assemble the file from all groups."""


class GroupFileCoder(FileCoder[EncodedGroup]):
    """Codes all bits of the tokens of a group in one payload, with a prior or as raw bits."""

    def __init__(
        self,
        token_encoder: TokenEncoder | None,
        num_frames: int,
        token_format: TokenFormat,
        timings_s: dict[str, float],
    ) -> None:
        super().__init__(token_format, timings_s)
        self._token_encoder, self._num_frames = token_encoder, num_frames

    def encode(self, bits_BNL: Tensor) -> EncodedGroup:
        """See `FileCoder.encode`."""
        return encode_group(self._token_encoder, bits_BNL, self._num_frames, self._timings_s)

    def finish(self, header: Header) -> CompressedFile:
        """See `FileCoder.finish`."""
        return build_file(header, self._token_format, self._groups, self._timings_s)


class PlaneFileCoder(FileCoder[dict[BitRange, EncodedPlane]]):
    """Codes planes of nested bits, for all numbers of bits from which the rate is selected.

    Raises:
        ValueError: the tokens cannot be cut to the bits of the rate.
    """

    def __init__(
        self,
        token_encoder: TokenEncoder | None,
        layout: PlaneLayout,
        rate: Rate,
        token_format: TokenFormat,
        timings_s: dict[str, float],
    ) -> None:
        super().__init__(token_format, timings_s)
        self._token_encoder, self._layout, self._rate = token_encoder, layout, rate
        self._candidates = layout.candidates(rate)
        self._ranges = layout.ranges(self._candidates)

    def encode(self, bits_BNL: Tensor) -> dict[BitRange, EncodedPlane]:
        """See `FileCoder.encode`; planes of different candidates overlap."""
        return encode_planes(self._token_encoder, self._ranges, bits_BNL, self._timings_s)

    def finish(self, header: Header) -> CompressedFile:
        """Return the largest file that fits.

        Raises:
            ValueError: no file fits.
        """
        size = 0
        for num_bits in reversed(self._candidates):
            file = self._build(header, num_bits)
            size = len(file.data)
            if self._rate.target_bytes is None or size <= self._rate.target_bytes:
                return file
        raise ValueError(
            f"{self._rate.target_bytes} bytes are not enough: with {self._candidates[0]} bits per token the file has "
            f"{size} bytes; choose a larger target"
        )

    def finish_with_lpips(
        self, header: Header, pixels_HWC: np.ndarray, decompress: Callable[[bytes], Image.Image]
    ) -> CompressedFile:
        """Return the smallest file of an image whose LPIPS (alex) reaches the target; decodes each candidate.

        Args:
            pixels_HWC: the image, uint8.
            decompress: decodes a file.

        Raises:
            ValueError: no file reaches it, or the image is too small for LPIPS.
        """
        target, min_side, value = self._rate.target_lpips, MIN_SIDE["alex"], 0.0
        assert target is not None
        if min(pixels_HWC.shape[:2]) < min_side:
            raise ValueError(f"--target-lpips needs an image of {min_side} x {min_side} pixels or more")
        original_1CHW = _to_float(pixels_HWC)
        for num_bits in self._candidates:
            file = self._build(header, num_bits)
            value = float(lpips(original_1CHW, _to_float(np.array(decompress(file.data)))))
            if value <= target:
                return file
        raise ValueError(
            f"LPIPS {target:g} cannot be reached: with all {self._candidates[-1]} bits per token it is {value:.4f}; "
            "choose a larger target"
        )

    def _build(self, header: Header, num_bits: int) -> CompressedFile:
        plane_bits = self._layout.plane_bits(num_bits)
        return build_plane_file(header, self._token_format, self._groups, plane_bits, self._timings_s)


def _to_float(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)
