"""Images and clips to bytes and back.

picture ─tiles─▶ Tokenizer.encode ─▶ tokens ─prior and range coder, group by group─▶ container
container ─▶ groups ─▶ tokens ─checksum─▶ Tokenizer.decode, windows blended over seams ─▶ picture

An image is a clip of one frame. A clip is coded in groups of pictures (GOPs) of as many frames as the tokenizer takes.

Shape suffixes: G groups of pictures, C colours, T frames, H and W pixels; R and C rows and columns of tiles, N tokens
of a tile, L bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from PIL import Image

from bsq_ray import config, model_folder
from bsq_ray.codec.container import (
    CODING_PRIOR,
    CODING_RAW,
    Container,
    Header,
    VideoHeader,
    read_image_container,
    read_video_container,
    validate_header,
    write_container,
)
from bsq_ray.codec.pixel_codec import PixelCodec
from bsq_ray.codec.tile_groups import EncodedGroup, decode_groups, encode_group, group_size, max_groups_per_pass
from bsq_ray.codec.tiles import place_tiles, split_tiles
from bsq_ray.media.color import SRGB, Color
from bsq_ray.media.images import to_srgb
from bsq_ray.media.limits import MAX_PIXELS
from bsq_ray.models.prior import Prior
from bsq_ray.models.tokenizer import Tokenizer

Box = tuple[int, int, int, int]
ProgressCallback = Callable[[int, int], None]
_TOLERANCE = 14


@dataclass(frozen=True)
class CompressedFile:
    """A file and what it consists of.

    Attributes:
        data: the file.
        bits_per_pixel: of the whole file, over the pixels of all frames.
        raw_bits: of the tokens before the prior.
        cross_entropy_bits, side_bits: of the tokens under the prior, and of the side information; 0 without a prior.
        seconds: by part: "tokenizer", "prior", "coder".
        frames: 1 for an image.
    """

    data: bytes
    bits_per_pixel: float
    raw_bits: int
    cross_entropy_bits: float
    side_info_bits: int
    timings_s: dict[str, float]
    num_frames: int = 1


def _no_progress(done: int, total: int) -> None:
    pass


class Codec:
    """Compresses images and clips of any size with a tokenizer and, if there is one, a prior.

    Args:
        tokenizer: of images or clips; one of clips takes images too if it is causal. Its decoder is kept in
            `arithmetic` from the first decoding on.
        prior: trained on this tokenizer's tokens; None writes their bits as they are.
        batch: tiles that go through a model at once; None chooses by their tokens. Files do not depend on it.
        arithmetic: of decoding pixels. In fp64 every machine decodes the same bytes; fp32 takes half the time, and its
            pixels may differ by a level.

    Raises:
        ValueError: the models do not belong together, or were not read from model folders.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior | None = None,
        batch_size: int | None = None,
        decode_dtype: torch.dtype = torch.float64,
    ) -> None:
        model_config = tokenizer.config
        if prior is not None:
            side = model_config.image_size // model_config.patch_size
            is_compatible = (
                prior.config.grid == (model_config.frames, side, side) and prior.config.bits == tokenizer.quantizer.bits
            )
            if not is_compatible:
                raise ValueError("tokenizer and prior do not belong together: their tokens differ in number or bits")
        # Logits and tokens are those of fp32, whatever the weights were kept in.
        self.tokenizer, self.prior = tokenizer.float().eval(), prior.float().eval() if prior else None
        self.batch_size = batch_size
        self._pixel_codec = PixelCodec(self.tokenizer, decode_dtype, batch_size)
        self._tokenizer_id, self._prior_id = _short_id(tokenizer), _short_id(prior) if prior else bytes(8)

    @classmethod
    def from_pretrained(
        cls,
        url: str,
        weights: Literal["ema", "plain"] = "ema",
        device: str = "cpu",
        batch_size: int | None = None,
        decode_dtype: torch.dtype = torch.float64,
    ) -> Codec:
        """Reads the model folder of a prior, whose `tokenizer/` is its tokenizer, or of a tokenizer alone.

        Raises:
            ValueError: there is no such folder, its parts do not belong together, or it holds another kind of model.
        """
        run_config = model_folder.load_model_folder(url, weights).config
        if isinstance(run_config, config.TokenizerConfig):
            return cls(Tokenizer.from_pretrained(url, weights).to(device), None, batch_size, decode_dtype)
        prior = Prior.from_pretrained(url, weights).to(device)
        return cls(Tokenizer.from_token_model(url, prior.config).to(device), prior, batch_size, decode_dtype)

    def compress(self, image: Image.Image, on_progress: ProgressCallback = _no_progress) -> CompressedFile:
        """Compresses an image, which becomes sRGB; transparency is laid on white.

        Raises:
            ValueError: the image is larger than the format's decoders read, or the tokenizer takes whole clips only.
        """
        model_config = self.tokenizer.config
        if model_config.frames > 1 and not model_config.causal:
            raise ValueError("this tokenizer looks at later frames, so it takes clips only, not images")
        pixels_THWC = np.array(to_srgb(image))[None]
        header = self._make_header(pixels_THWC.shape[2], pixels_THWC.shape[1], None)
        timings_s: dict[str, float] = {}
        groups = self._encode(header, 0, pixels_THWC, timings_s, on_progress)
        return self._build_result(header, groups, timings_s)

    def compress_clip(
        self,
        frames: Iterable[np.ndarray],
        frame_rate: Fraction | int,
        color: Color = SRGB,
        on_progress: ProgressCallback = _no_progress,
    ) -> CompressedFile:
        """Compresses a clip, one group of pictures after the other.

        Args:
            frames: uint8 (H, W, 3), all of one size.
            rate: frames per second.
            colour: how the values are meant, for those who show the frames; it does not change them.
            progress: called with frames done and 0, for how many follow is not known.

        Raises:
            ValueError: there are no frames, they differ in size, they are too large, or the rate cannot be written.
        """
        frame_rate = Fraction(frame_rate)
        if frame_rate <= 0 or max(frame_rate.numerator, frame_rate.denominator) >= 2**32:
            raise ValueError(f"the rate {frame_rate} must be positive, its numerator and denominator below 2^32")
        timings_s: dict[str, float] = {}
        groups: list[EncodedGroup] = []
        num_frames, gop_size = 0, self.tokenizer.config.frames
        header: Header | None = None
        for gop_index, pixels_THWC in enumerate(_iter_gops(frames, gop_size)):
            num_frames += len(pixels_THWC)
            if header is None:
                clip = VideoHeader(1, gop_size, frame_rate, color)
                header = self._make_header(pixels_THWC.shape[2], pixels_THWC.shape[1], clip)
            if pixels_THWC.shape[1:3] != (header.height, header.width):
                raise ValueError("the frames of a clip must all have one size")
            # The last group is filled with its last frame.
            padded_THWC = np.concatenate([pixels_THWC, np.repeat(pixels_THWC[-1:], gop_size - len(pixels_THWC), 0)])
            frames_before = num_frames - len(pixels_THWC)
            groups += self._encode(
                header, gop_index, padded_THWC, timings_s, lambda *_, done=frames_before: on_progress(done, 0)
            )
            on_progress(num_frames, 0)
        if header is None:
            raise ValueError("the clip has no frames")
        assert header.clip is not None
        header = replace(header, clip=replace(header.clip, num_frames=num_frames))
        return self._build_result(header, groups, timings_s)

    def decompress(
        self,
        data: bytes,
        region: Box | None = None,
        max_pixels: int = MAX_PIXELS,
        on_progress: ProgressCallback = _no_progress,
        timings_s: dict[str, float] | None = None,
    ) -> Image.Image:
        """The image, or a part of it.

        Args:
            region: left, top, right and lower edge in pixels; only the groups that it touches are decoded.
            max_pixels: larger images are refused.
            seconds: "tokenizer", "prior" and "coder" are added to it.

        Raises:
            ValueError: the file is damaged, of other models or a newer version, or a clip, or the region is outside.
        """
        container = read_image_container(data, True, max_pixels)
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
        on_progress: ProgressCallback = _no_progress,
        timings_s: dict[str, float] | None = None,
    ) -> Iterator[np.ndarray]:
        """The frames of a clip, uint8 (H, W, 3), one after the other.

        Args:
            frames: which ones, in steps of 1; only their groups of pictures are decoded, and of the last only what
                comes before if tokenizer is causal.
            region, max_pixels, seconds: as for an image.
            progress: called with frames done and wanted.

        Raises:
            ValueError: as `decompress`, or the clip has no such frames.
        """
        container = read_video_container(data, True, max_pixels)
        num_frames = container.header.num_frames
        frame_range = range(num_frames) if frames is None else frames
        if not (0 <= frame_range.start < frame_range.stop <= num_frames and frame_range.step == 1):
            raise ValueError(
                f"frames {frame_range.start} to {frame_range.stop - 1} are wanted, the clip has 0 to {num_frames - 1}"
            )
        return self._decode_frames(container, frame_range, region, on_progress, {} if timings_s is None else timings_s)

    def preview(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, float]:
        """What the first part of a file shows already, grey where the rest is missing, and which share of it is there.

        Raises:
            ValueError: the part ends before the index does, or is damaged.
        """
        container = read_image_container(data, False, max_pixels)
        [pixels_HWC] = self._decode_frames(container, range(1), None, _no_progress, {})
        return Image.fromarray(pixels_HWC), container.num_complete_groups / len(container.index_GE)

    def preview_clip(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Iterator[np.ndarray], int]:
        """The frames that the first part of a file shows already, grey where the rest is missing, and their number.

        Raises:
            ValueError: the part ends before the index does, or is damaged.
        """
        container = read_video_container(data, False, max_pixels)
        header = container.header
        num_available = min(
            header.num_frames, -(-container.num_complete_groups // header.groups_per_gop) * header.gop_size
        )
        return self._decode_frames(container, range(num_available), None, _no_progress, {}), num_available

    def _make_header(self, width: int, height: int, clip: VideoHeader | None) -> Header:
        model_config = self.tokenizer.config
        header = Header(
            coding=CODING_PRIOR if self.prior else CODING_RAW,
            tolerance=_TOLERANCE,
            width=width,
            height=height,
            tile=model_config.image_size,
            patch=model_config.patch_size,
            bits=self.tokenizer.quantizer.bits,
            group=group_size(self.prior),
            tokenizer=self._tokenizer_id,
            prior=self._prior_id,
            clip=clip,
        )
        validate_header(header)
        return header

    def _encode(
        self,
        header: Header,
        gop_index: int,
        pixels_THWC: np.ndarray,
        timings_s: dict[str, float],
        on_progress: ProgressCallback,
    ) -> list[EncodedGroup]:
        """The groups of one group of pictures."""
        start_time = time.perf_counter()
        tiles = split_tiles(torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2), header.tile)
        bits_BNL = self._pixel_codec.encode(tiles.flatten(0, 1), lambda: on_progress(0, header.groups_per_gop))
        bits_RCNL = bits_BNL.unflatten(0, tiles.shape[:2])
        timings_s["tokenizer"] = timings_s.get("tokenizer", 0.0) + time.perf_counter() - start_time
        groups = []
        for group_in_gop, rows, columns in header.iter_groups():
            group_BNL = bits_RCNL[rows.start : rows.stop, columns.start : columns.stop].flatten(0, 1)
            group_index = gop_index * header.groups_per_gop + group_in_gop
            groups.append(
                encode_group(
                    self.prior, group_index, group_BNL, header.gop_size, header.tolerance, self.batch_size, timings_s
                )
            )
            on_progress(group_in_gop + 1, header.groups_per_gop)
        return groups

    def _build_result(self, header: Header, groups: list[EncodedGroup], timings_s: dict[str, float]) -> CompressedFile:
        data = write_container(header, [group.payload for group in groups], [group.token_crcs for group in groups])
        rows, columns = header.tile_grid
        return CompressedFile(
            data,
            8 * len(data) / (header.width * header.height * header.num_frames),
            rows * columns * header.tokens_per_frame * header.bits * header.gop_size * header.num_gops,
            sum(group.cross_entropy_bits for group in groups),
            sum(group.side_info_bits for group in groups),
            timings_s,
            header.num_frames,
        )

    def _decode_frames(
        self,
        container: Container,
        frames: range,
        region: Box | None,
        on_progress: ProgressCallback,
        timings_s: dict[str, float],
    ) -> Iterator[np.ndarray]:
        """Checks everything that can be checked at once, then yields the frames."""
        header = container.header
        self._check_models(header)
        box = region or (0, 0, header.width, header.height)
        if not (0 <= box[0] < box[2] <= header.width and 0 <= box[1] < box[3] <= header.height):
            raise ValueError(f"the region {box} is not inside the picture of {header.width} x {header.height} pixels")
        return self._iter_decoded_frames(container, frames, box, on_progress, timings_s)

    def _iter_decoded_frames(
        self, container: Container, frames: range, box: Box, on_progress: ProgressCallback, timings_s: dict[str, float]
    ) -> Iterator[np.ndarray]:
        header, tile, num_frames_done, num_groups_done = container.header, container.header.tile, 0, 0
        # The tiles next to the region take part in blending its seams.
        rows = range(max(0, box[1] // tile - 1), min(header.tile_grid[0], -(-box[3] // tile) + 1))
        columns = range(max(0, box[0] // tile - 1), min(header.tile_grid[1], -(-box[2] // tile) + 1))
        groups = list(header.iter_groups(rows, columns))
        offset = box[0] - columns.start * tile, box[1] - rows.start * tile
        inner_box = (*offset, offset[0] + box[2] - box[0], offset[1] + box[3] - box[1])
        first_gop, last_gop = frames.start // header.gop_size, -(-frames.stop // header.gop_size)
        gops_per_pass = max(1, max_groups_per_pass(self.prior, header) // len(groups))

        def report_progress() -> None:
            on_progress(*((num_groups_done, len(groups)) if header.clip is None else (num_frames_done, len(frames))))

        for start in range(first_gop, last_gop, gops_per_pass):
            gops = range(start, min(start + gops_per_pass, last_gop))
            frame_ranges = [
                range(
                    max(frames.start - gop * header.gop_size, 0),
                    min(frames.stop - gop * header.gop_size, header.gop_size),
                )
                for gop in gops
            ]
            # Tokens of later frames say nothing about these.
            num_gop_frames = (
                max(frame_range.stop for frame_range in frame_ranges)
                if self.tokenizer.config.causal
                else header.gop_size
            )
            tiles = len(gops), len(rows), len(columns)
            bits_GRCNL = torch.zeros(*tiles, num_gop_frames * header.tokens_per_frame, header.bits, dtype=torch.bool)
            available_GRC = torch.zeros(tiles, dtype=torch.bool)
            groups_to_decode = [
                (gop * header.groups_per_gop + number, len(down) * len(right))
                for gop in gops
                for number, down, right in groups
            ]
            decoded = decode_groups(
                self.prior, container, groups_to_decode, num_gop_frames, self.batch_size, timings_s, report_progress
            )
            for index, bits_BNL in decoded:
                num_groups_done += 1
                gop, (_, down, right) = index // len(groups), groups[index % len(groups)]
                group_RCNL = bits_BNL.unflatten(0, (len(down), len(right)))
                place_tiles(bits_GRCNL[gop], available_GRC[gop], group_RCNL, (down, right), rows, columns)
                report_progress()
            for bits_RCNL, available_RC, frame_range in zip(bits_GRCNL, available_GRC, frame_ranges, strict=True):
                start_time = time.perf_counter()
                pixels_CTHW = self._pixel_codec.decode_region(
                    bits_RCNL, available_RC, num_gop_frames, inner_box, report_progress
                )
                timings_s["tokenizer"] = timings_s.get("tokenizer", 0.0) + time.perf_counter() - start_time
                for frame in frame_range:
                    num_frames_done += 1
                    report_progress()
                    yield pixels_CTHW[:, frame].permute(1, 2, 0).contiguous().numpy()

    def _check_models(self, header: Header) -> None:
        model_config = self.tokenizer.config
        if header.coding == CODING_PRIOR and self.prior is None:
            raise ValueError(f"the file was written with the prior {header.prior.hex()}; give that model")
        if header.coding == CODING_RAW and self.prior is not None:
            raise ValueError("the file was written without a prior; give the tokenizer's model folder")
        for name, file_id, model_id in (
            ("tokenizer", header.tokenizer, self._tokenizer_id),
            ("prior", header.prior, self._prior_id),
        ):
            if file_id != model_id:
                raise ValueError(f"the file was written with the {name} {file_id.hex()}, this one is {model_id.hex()}")
        matches = (header.tile, header.patch, header.bits) == (
            model_config.image_size, model_config.patch_size, self.tokenizer.quantizer.bits
        )  # fmt: skip
        matches = matches and (header.clip is None or header.gop_size == model_config.frames)
        matches = matches and (header.clip is not None or model_config.frames == 1 or model_config.causal)
        if not matches or header.group > group_size(self.prior):
            raise ValueError("the file is damaged: its tiles, tokens or frames are not those of the models it names")


def _iter_gops(frames: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    gop_frames: list[np.ndarray] = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        if gop_frames and frame.shape != gop_frames[0].shape:
            raise ValueError("the frames of a clip must all have one size")
        gop_frames.append(frame)
        if len(gop_frames) == size:
            yield np.stack(gop_frames)
            gop_frames = []
    if gop_frames:
        yield np.stack(gop_frames)


def _short_id(model: Tokenizer | Prior) -> bytes:
    if model.model_id is None:
        raise ValueError("the codec needs models that were read from a model folder: files carry the models' ids")
    return bytes.fromhex(model.model_id)[:8]
