"""Compression of images and clips to `.bsq` files.

pixels ─tiles─▶ Tokenizer.encode ─▶ tokens ─prior and range coder, group by group─▶ container
container ─▶ groups ─▶ tokens ─checksum─▶ Tokenizer.decode, windows blended over seams ─▶ pixels

An image is a clip of one frame. A clip is coded in groups of pictures (GOPs) with the tokenizer's number of frames.

Shape suffixes: G groups of pictures, C colors, T frames, H and W pixels; R and C rows and columns of tiles, N tokens
of a tile, L bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from bsq_ray import config, model_folder
from bsq_ray.codec.container import Container, read_container, read_image_container, read_video_container
from bsq_ray.codec.entropy_coding import TokenEncoder
from bsq_ray.codec.file_coders import FileCoder, GroupFileCoder, PlaneFileCoder
from bsq_ray.codec.frame_decoder import FrameDecoder
from bsq_ray.codec.frame_encoder import CompressedFile, FrameEncoder, iter_gops
from bsq_ray.codec.header import (
    CODING_PLANES,
    CODING_PRIOR,
    CODING_RAW,
    Header,
    TokenFormat,
    VideoHeader,
    validate_header,
)
from bsq_ray.codec.pixel_codec import build_pixel_codec
from bsq_ray.codec.rate import Rate, build_plane_layout
from bsq_ray.codec.rect import Rect
from bsq_ray.codec.tile_groups import group_size
from bsq_ray.codec.written_format import readable_formats, written_format
from bsq_ray.media.color import SRGB, ColorDescription
from bsq_ray.media.images import to_srgb
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.model_folder import WeightsKind
from bsq_ray.models.prior import Prior
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress

Box = tuple[int, int, int, int]


class Codec:
    """Compresses images and clips of any size with a tokenizer and an optional prior.

    Args:
        tokenizer: tokenizer of images or clips; a causal video tokenizer also takes images. The first decoding converts
            its decoder to `decode_dtype`.
        prior: prior trained on this tokenizer's tokens; None stores raw bits.
        batch_size: tiles in one pass through a model; None chooses by the number of tokens. Files do not depend on it.
        decode_dtype: data type of decoding pixels. With fp64 every machine decodes the same bytes. fp32 takes half the
            time, and pixels may differ by a level.

    Raises:
        ValueError: the models do not match, or were not loaded from model folders.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior | None = None,
        batch_size: int | None = None,
        decode_dtype: torch.dtype = torch.float64,
    ) -> None:
        model_config = tokenizer.config
        side = model_config.grid_size
        if prior is not None:
            # Images of any size can be divided into tiles of any size.
            side = prior.config.grid[1] if model_config.any_size else side
            is_compatible = (
                prior.config.grid == (model_config.frames, side, side) and prior.config.bits == tokenizer.quantizer.bits
            )
            if not is_compatible:
                raise ValueError("tokenizer and prior do not match: their tokens differ in number or bits")
            # Tiles start where the repeating position embeddings do.
            if model_config.any_size and side % model_config.position_period:
                raise ValueError(
                    f"tokenizer and prior do not match: the prior's {side} rows of tokens are not a multiple of the "
                    f"tokenizer's model.position_period {model_config.position_period}"
                )
        # Files are defined by fp32 logits and tokens, whatever the data type of the weights.
        self.tokenizer, self.prior = tokenizer.float().eval(), prior.float().eval() if prior else None
        self.batch_size = batch_size
        self._pixel_codec = build_pixel_codec(self.tokenizer, decode_dtype, batch_size, side)
        self._token_encoder = TokenEncoder(self.prior, batch_size) if self.prior else None
        self._encoder = FrameEncoder(self._pixel_codec)
        self.plane_layout = build_plane_layout(model_config.quantizer, prior.config if prior else None)
        self.token_format = TokenFormat(
            side * model_config.patch_size,
            model_config.patch_size,
            tokenizer.quantizer.bits,
            _model_id(tokenizer),
            _model_id(prior) if prior else b"",
        )
        self.token_formats = readable_formats(self.token_format, tokenizer.same_tokens)

    @classmethod
    def from_pretrained(
        cls,
        url: str,
        weights: WeightsKind = "ema",
        device: str = "cpu",
        batch_size: int | None = None,
        decode_dtype: torch.dtype = torch.float64,
    ) -> Codec:
        """Load the model folder of a prior, which contains its tokenizer in `tokenizer/`, or of a tokenizer alone.

        Raises:
            ValueError: the folder does not exist, its parts do not match, or it contains another kind of model.
        """
        run_config = model_folder.load_model_folder(url, weights).config
        if isinstance(run_config, config.TokenizerConfig):
            return cls(Tokenizer.from_pretrained(url, weights).to(device), None, batch_size, decode_dtype)
        prior = Prior.from_pretrained(url, weights).to(device)
        return cls(Tokenizer.from_token_model(url, prior.config).to(device), prior, batch_size, decode_dtype)

    def compress(
        self, image: Image.Image, on_progress: ProgressCallback = no_progress, rate: Rate = Rate()
    ) -> CompressedFile:
        """Compress an image after conversion to sRGB; transparent pixels are blended with white.

        Args:
            on_progress: called with groups done and their number; an exception raised by it stops the encoding.
            rate: bits per token, or a target; other than all bits only with nested bits.

        Raises:
            ValueError: the image exceeds the size limit of the format, the tokenizer takes whole clips only or has no
                nested bits, or the rate cannot be reached.
        """
        model_config = self.tokenizer.config
        if model_config.frames > 1 and not model_config.causal:
            raise ValueError(
                "this tokenizer is not causal, so it takes clips only; use a causal or an image tokenizer for images"
            )
        pixels_THWC = np.array(to_srgb(image))[None]
        header = self._make_header(pixels_THWC.shape[2], pixels_THWC.shape[1], None)
        timings_s: dict[str, float] = {}
        coder = self._start_coding(rate, header, timings_s)
        coder.add(self._encoder.encode_gop(header, pixels_THWC, coder.encode, timings_s, on_progress))
        if rate.target_lpips is None:
            return coder.finish(header)
        assert isinstance(coder, PlaneFileCoder)
        return coder.finish_with_lpips(header, pixels_THWC[0], self.decompress)

    def compress_clip(
        self,
        frames: Iterable[np.ndarray],
        frame_rate: Fraction | int,
        color: ColorDescription = SRGB,
        on_progress: ProgressCallback = no_progress,
        rate: Rate = Rate(),
    ) -> CompressedFile:
        """Compress a clip, one group of pictures at a time.

        Args:
            frames: uint8 (H, W, 3), all of one size.
            frame_rate: frames per second.
            color: color space, stored for players; pixel values are not converted.
            on_progress: called with the number of frames done and 0, because the total is unknown.
            rate: as in `compress`; without `target_lpips`, for which all frames would be in memory.

        Raises:
            ValueError: there are no frames, their sizes differ or are too large, or the frame rate is out of range; or
                as in `compress`.
        """
        if rate.target_lpips is not None:
            raise ValueError("--target-lpips is for images; choose --bits or --target-bytes for a clip")
        frame_rate = Fraction(frame_rate)
        if frame_rate <= 0 or max(frame_rate.numerator, frame_rate.denominator) >= 2**32:
            raise ValueError(f"the frame rate {frame_rate} must be positive, its numerator and denominator below 2^32")
        timings_s: dict[str, float] = {}
        num_frames, gop_size = 0, self.tokenizer.config.frames
        header: Header | None = None
        coder: FileCoder[Any] | None = None
        for pixels_THWC in iter_gops(frames, gop_size):
            num_frames += len(pixels_THWC)
            if header is None:
                clip = VideoHeader(1, gop_size, frame_rate, color)
                header = self._make_header(pixels_THWC.shape[2], pixels_THWC.shape[1], clip)
                coder = self._start_coding(rate, header, timings_s)
            assert coder is not None
            if pixels_THWC.shape[1:3] != (header.height, header.width):
                raise ValueError("the frames of a clip must have the same size")
            # Pad the last group by repeating its last frame.
            padded_THWC = np.concatenate([pixels_THWC, np.repeat(pixels_THWC[-1:], gop_size - len(pixels_THWC), 0)])
            frames_before = num_frames - len(pixels_THWC)
            coder.add(
                self._encoder.encode_gop(
                    header, padded_THWC, coder.encode, timings_s, lambda *_, done=frames_before: on_progress(done, 0)
                )
            )
            on_progress(num_frames, 0)
        if header is None or coder is None:
            raise ValueError("the clip has no frames")
        assert header.clip is not None
        return coder.finish(replace(header, clip=replace(header.clip, num_frames=num_frames)))

    def decompress(
        self,
        data: bytes,
        region: Box | None = None,
        max_pixels: int = MAX_PIXELS,
        on_progress: ProgressCallback = no_progress,
        timings_s: dict[str, float] | None = None,
    ) -> Image.Image:
        """Decompress an image, or a region of it. A cut file with planes gives an image of fewer bits per token.

        Args:
            region: left, top, right and bottom edge in pixels. The tiles that take part in its pixels are decoded
                together with the rest of their groups.
            max_pixels: larger images are rejected.
            on_progress: called with groups done and their number; an exception raised by it stops the decoding.
            timings_s: the seconds of "tokenizer", "prior" and "coder" are added to it.

        Raises:
            ValueError: the file is damaged, of other models, of a newer version or a clip, or the region is outside.
        """
        container = read_image_container(data, written_format(self.token_formats, data, max_pixels), True, max_pixels)
        [pixels_HWC] = self._decode_frames(
            container, range(1), region, on_progress, {} if timings_s is None else timings_s
        )
        return Image.fromarray(pixels_HWC)

    def decompress_clip(
        self,
        data: bytes,
        frames: range | None = None,
        region: Box | None = None,
        max_pixels: int = MAX_PIXELS,
        on_progress: ProgressCallback = no_progress,
        timings_s: dict[str, float] | None = None,
    ) -> Iterator[np.ndarray]:
        """Decompress frames of a clip one by one, uint8 (H, W, 3).

        Args:
            frames: frame indices in steps of 1. Only their groups of pictures are decoded; with a causal tokenizer only
                the tokens up to the last requested frame.
            region, max_pixels, timings_s: as in `decompress`.
            on_progress: called with frames done and the number of requested frames.

        Raises:
            ValueError: as `decompress`, or the clip does not have these frames.
        """
        container = read_video_container(data, written_format(self.token_formats, data, max_pixels), True, max_pixels)
        num_frames = container.header.num_frames
        frame_range = range(num_frames) if frames is None else frames
        if not (0 <= frame_range.start < frame_range.stop <= num_frames and frame_range.step == 1):
            raise ValueError(
                f"frames {frame_range.start} to {frame_range.stop - 1} do not exist; the clip has 0 to {num_frames - 1}"
            )
        return self._decode_frames(container, frame_range, region, on_progress, {} if timings_s is None else timings_s)

    def preview(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, float]:
        """Decode the first part of an image file, gray where data is missing; also return the available fraction.

        Raises:
            ValueError: the data ends before the end of the index, or is damaged.
        """
        container = read_image_container(data, written_format(self.token_formats, data, max_pixels), False, max_pixels)
        fraction = 0.0

        def record_fraction(done: int, total: int) -> None:
            nonlocal fraction
            fraction = done / total

        [pixels_HWC] = self._decode_frames(container, range(1), None, record_fraction, {})
        return Image.fromarray(pixels_HWC), fraction

    def preview_clip(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Iterator[np.ndarray], int]:
        """Decode the first part of a clip file, gray where data is missing; also return the number of frames.

        Raises:
            ValueError: the data ends before the end of the index, or is damaged.
        """
        container = read_video_container(data, written_format(self.token_formats, data, max_pixels), False, max_pixels)
        header = container.header
        num_available = min(
            header.num_frames, -(-container.num_complete_groups // header.groups_per_gop) * header.gop_size
        )
        return self._decode_frames(container, range(num_available), None, no_progress, {}), num_available

    def available_bits(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
        """Return the bits per token that a file decodes to, and those that it had before it was cut.

        Raises:
            ValueError: as `decompress`.
        """
        container = read_container(data, written_format(self.token_formats, data, max_pixels), False, max_pixels)
        return container.num_bits, sum(container.header.plane_bits) or container.header.bits

    def plane_ends(self, data: bytes, max_pixels: int = MAX_PIXELS) -> list[int]:
        """Return the number of bytes up to the end of each whole plane; a file without planes is one.

        Raises:
            ValueError: as `decompress`.
        """
        planes = read_container(data, written_format(self.token_formats, data, max_pixels), False, max_pixels).planes
        return [len(data)] if planes is None else planes.ends

    def _start_coding(self, rate: Rate, header: Header, timings_s: dict[str, float]) -> FileCoder[Any]:
        """Return the coder of the groups of a file.

        Raises:
            ValueError: the models cannot code this rate.
        """
        if self.plane_layout is not None:
            return PlaneFileCoder(self._token_encoder, self.plane_layout, rate, self.token_format, timings_s)
        if not rate.is_default:
            raise ValueError(
                "this model codes all bits of a token, so the rate is fixed; --bits, --target-bytes and --target-lpips "
                "need a tokenizer trained with nested bits (model.quantizer.keep), and a prior with model.order plane"
            )
        return GroupFileCoder(self._token_encoder, header.gop_size, self.token_format, timings_s)

    def _make_header(self, width: int, height: int, clip: VideoHeader | None) -> Header:
        coding = CODING_PRIOR if self.prior else CODING_RAW
        if self.plane_layout is not None:
            coding = CODING_PLANES
        header = Header(
            width,
            height,
            coding,
            group_size(self.prior),
            self.token_format.model_key,
            tile_size=self.token_format.tile_size,
            patch_size=self.token_format.patch_size,
            bits=self.token_format.bits,
            clip=clip,
            has_plane_prior=self.plane_layout is not None and self.prior is not None,
        )
        validate_header(header)
        return header

    def _decode_frames(
        self,
        container: Container,
        frames: range,
        region: Box | None,
        on_progress: ProgressCallback,
        timings_s: dict[str, float],
    ) -> Iterator[np.ndarray]:
        """Check the models and the region, then return an iterator over the frames."""
        header = container.header
        self._check_frames(header)
        image = Rect(0, 0, header.height, header.width)
        left, top, right, bottom = region or (0, 0, header.width, header.height)
        if not image.contains(Rect(top, left, bottom, right)):
            raise ValueError(
                f"the region {region} is not inside the image of {header.width} x {header.height} pixels; "
                "give left, top, right and bottom"
            )
        return FrameDecoder(
            container,
            frames,
            Rect(top, left, bottom, right),
            self.prior,
            self._pixel_codec,
            self.batch_size,
            on_progress,
            timings_s,
        ).decode()

    def _check_frames(self, header: Header) -> None:
        model_config = self.tokenizer.config
        if header.clip is None:
            matches = model_config.frames == 1 or model_config.causal
        else:
            matches = header.gop_size == model_config.frames
        if not matches or header.group_size > group_size(self.prior):
            raise ValueError("the file is damaged: its tiles, tokens or frames do not match its models")
        if header.coding == CODING_PRIOR and self.prior is not None and self.prior.config.order != "token":
            raise ValueError("the file is damaged: it is coded token by token, and the prior codes planes")
        if header.plane_bits and self.plane_layout is None:
            raise ValueError("the file contains planes of nested bits, which these models do not have")
        if self.plane_layout is not None and any(bits % self.plane_layout.unit for bits in header.plane_bits):
            raise ValueError("the file is damaged: its planes are not whole sub-tokens of the prior")


def _model_id(model: Tokenizer | Prior) -> bytes:
    if model.model_id is None:
        raise ValueError(
            "the models have no id; load them from a model folder, because files contain the ids of their models"
        )
    return bytes.fromhex(model.model_id)
