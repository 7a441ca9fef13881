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
    MAX_PIXELS,
    PRIOR,
    RAW,
    Clip,
    Container,
    Header,
    check_header,
    read_clip,
    read_image,
    write_container,
)
from bsq_ray.codec.pixel_codec import PixelCoder
from bsq_ray.codec.tile_groups import CodedGroup, decode_groups, encode_group, group_size, groups_at_once
from bsq_ray.codec.tiles import cut, put
from bsq_ray.media.color import SRGB, Colour, to_srgb
from bsq_ray.models.prior import Prior
from bsq_ray.models.tokenizer import Tokenizer

Box = tuple[int, int, int, int]
Progress = Callable[[int, int], None]
_TOLERANCE = 14


@dataclass(frozen=True)
class Compressed:
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
    side_bits: int
    seconds: dict[str, float]
    frames: int = 1


def _silent(done: int, total: int) -> None:
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
        batch: int | None = None,
        arithmetic: torch.dtype = torch.float64,
    ) -> None:
        section = tokenizer.config
        if prior is not None:
            side = section.image_size // section.patch_size
            fits = prior.config.grid == (section.frames, side, side) and prior.config.bits == tokenizer.quantizer.bits
            if not fits:
                raise ValueError("tokenizer and prior do not belong together: their tokens differ in number or bits")
        # Logits and tokens are those of fp32, whatever the weights were kept in.
        self.tokenizer, self.prior = tokenizer.float().eval(), prior.float().eval() if prior else None
        self.batch = batch
        self._pixels = PixelCoder(self.tokenizer, arithmetic, batch)
        self._tokenizer_id, self._prior_id = _short_id(tokenizer), _short_id(prior) if prior else bytes(8)

    @classmethod
    def from_pretrained(
        cls,
        url: str,
        weights: Literal["ema", "plain"] = "ema",
        device: str = "cpu",
        batch: int | None = None,
        arithmetic: torch.dtype = torch.float64,
    ) -> Codec:
        """Reads the model folder of a prior, whose `tokenizer/` is its tokenizer, or of a tokenizer alone.

        Raises:
            ValueError: there is no such folder, its parts do not belong together, or it holds another kind of model.
        """
        run = model_folder.read_model_folder(url, weights).config
        if isinstance(run, config.TokenizerConfig):
            return cls(Tokenizer.from_pretrained(url, weights).to(device), None, batch, arithmetic)
        prior = Prior.from_pretrained(url, weights).to(device)
        return cls(Tokenizer.of_tokens(url, prior.config).to(device), prior, batch, arithmetic)

    def compress(self, image: Image.Image, progress: Progress = _silent) -> Compressed:
        """Compresses an image, which becomes sRGB; transparency is laid on white.

        Raises:
            ValueError: the image is larger than the format's decoders read, or the tokenizer takes whole clips only.
        """
        section = self.tokenizer.config
        if section.frames > 1 and not section.causal:
            raise ValueError("this tokenizer looks at later frames, so it takes clips only, not images")
        pixels_THWC = np.array(to_srgb(image))[None]
        header = self._header(pixels_THWC.shape[2], pixels_THWC.shape[1], None)
        seconds: dict[str, float] = {}
        coded = self._encode(header, 0, pixels_THWC, seconds, progress)
        return self._compressed(header, coded, seconds)

    def compress_clip(
        self, frames: Iterable[np.ndarray], rate: Fraction | int, colour: Colour = SRGB, progress: Progress = _silent
    ) -> Compressed:
        """Compresses a clip, one group of pictures after the other.

        Args:
            frames: uint8 (H, W, 3), all of one size.
            rate: frames per second.
            colour: how the values are meant, for those who show the frames; it does not change them.
            progress: called with frames done and 0, for how many follow is not known.

        Raises:
            ValueError: there are no frames, they differ in size, they are too large, or the rate cannot be written.
        """
        rate = Fraction(rate)
        if rate <= 0 or max(rate.numerator, rate.denominator) >= 2**32:
            raise ValueError(f"the rate {rate} must be positive, its numerator and denominator below 2^32")
        seconds: dict[str, float] = {}
        coded: list[CodedGroup] = []
        count, gop = 0, self.tokenizer.config.frames
        header: Header | None = None
        for number, pixels_THWC in enumerate(_gops(frames, gop)):
            count += len(pixels_THWC)
            if header is None:
                clip = Clip(1, gop, rate, colour)
                header = self._header(pixels_THWC.shape[2], pixels_THWC.shape[1], clip)
            if pixels_THWC.shape[1:3] != (header.height, header.width):
                raise ValueError("the frames of a clip must all have one size")
            # The last group is filled with its last frame.
            filled = np.concatenate([pixels_THWC, np.repeat(pixels_THWC[-1:], gop - len(pixels_THWC), 0)])
            before = count - len(pixels_THWC)
            coded += self._encode(header, number, filled, seconds, lambda *_, done=before: progress(done, 0))
            progress(count, 0)
        if header is None:
            raise ValueError("the clip has no frames")
        assert header.clip is not None
        header = replace(header, clip=replace(header.clip, frames=count))
        return self._compressed(header, coded, seconds)

    def decompress(
        self,
        data: bytes,
        region: Box | None = None,
        max_pixels: int = MAX_PIXELS,
        progress: Progress = _silent,
        seconds: dict[str, float] | None = None,
    ) -> Image.Image:
        """The image, or a part of it.

        Args:
            region: left, top, right and lower edge in pixels; only the groups that it touches are decoded.
            max_pixels: larger images are refused.
            seconds: "tokenizer", "prior" and "coder" are added to it.

        Raises:
            ValueError: the file is damaged, of other models or a newer version, or a clip, or the region is outside.
        """
        container = read_image(data, True, max_pixels)
        [pixels_HWC] = self._frames(container, range(1), region, progress, {} if seconds is None else seconds)
        return Image.fromarray(pixels_HWC)

    def decompress_clip(
        self,
        data: bytes,
        frames: range | None = None,
        region: Box | None = None,
        max_pixels: int = MAX_PIXELS,
        progress: Progress = _silent,
        seconds: dict[str, float] | None = None,
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
        container = read_clip(data, True, max_pixels)
        count = container.header.frames
        wanted = range(count) if frames is None else frames
        if not (0 <= wanted.start < wanted.stop <= count and wanted.step == 1):
            raise ValueError(f"frames {wanted.start} to {wanted.stop - 1} are wanted, the clip has 0 to {count - 1}")
        return self._frames(container, wanted, region, progress, {} if seconds is None else seconds)

    def preview(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, float]:
        """What the first part of a file shows already, grey where the rest is missing, and which share of it is there.

        Raises:
            ValueError: the part ends before the index does, or is damaged.
        """
        container = read_image(data, False, max_pixels)
        [pixels_HWC] = self._frames(container, range(1), None, _silent, {})
        return Image.fromarray(pixels_HWC), container.whole_groups / len(container.index_GE)

    def preview_clip(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Iterator[np.ndarray], int]:
        """The frames that the first part of a file shows already, grey where the rest is missing, and their number.

        Raises:
            ValueError: the part ends before the index does, or is damaged.
        """
        container = read_clip(data, False, max_pixels)
        header = container.header
        there = min(header.frames, -(-container.whole_groups // header.gop_groups) * header.gop)
        return self._frames(container, range(there), None, _silent, {}), there

    def _header(self, width: int, height: int, clip: Clip | None) -> Header:
        section = self.tokenizer.config
        header = Header(
            coding=PRIOR if self.prior else RAW,
            tolerance=_TOLERANCE,
            width=width,
            height=height,
            tile=section.image_size,
            patch=section.patch_size,
            bits=self.tokenizer.quantizer.bits,
            group=group_size(self.prior),
            tokenizer=self._tokenizer_id,
            prior=self._prior_id,
            clip=clip,
        )
        check_header(header)
        return header

    def _encode(
        self, header: Header, gop: int, pixels_THWC: np.ndarray, seconds: dict[str, float], progress: Progress
    ) -> list[CodedGroup]:
        """The groups of one group of pictures."""
        began = time.perf_counter()
        tiles = cut(torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2), header.tile)
        bits_BNL = self._pixels.encode(tiles.flatten(0, 1), lambda: progress(0, header.gop_groups))
        bits_RCNL = bits_BNL.unflatten(0, tiles.shape[:2])
        seconds["tokenizer"] = seconds.get("tokenizer", 0.0) + time.perf_counter() - began
        coded = []
        for place, rows, columns in header.groups():
            group_BNL = bits_RCNL[rows.start : rows.stop, columns.start : columns.stop].flatten(0, 1)
            number = gop * header.gop_groups + place
            coded.append(encode_group(self.prior, number, group_BNL, header.gop, header.tolerance, self.batch, seconds))
            progress(place + 1, header.gop_groups)
        return coded

    def _compressed(self, header: Header, coded: list[CodedGroup], seconds: dict[str, float]) -> Compressed:
        data = write_container(header, [group.payload for group in coded], [group.checks for group in coded])
        rows, columns = header.tiles
        return Compressed(
            data,
            8 * len(data) / (header.width * header.height * header.frames),
            rows * columns * header.frame_tokens * header.bits * header.gop * header.gops,
            sum(group.cross_entropy for group in coded),
            sum(group.side for group in coded),
            seconds,
            header.frames,
        )

    def _frames(
        self, container: Container, frames: range, region: Box | None, progress: Progress, seconds: dict[str, float]
    ) -> Iterator[np.ndarray]:
        """Checks everything that can be checked at once, then yields the frames."""
        header = container.header
        self._check_models(header)
        box = region or (0, 0, header.width, header.height)
        if not (0 <= box[0] < box[2] <= header.width and 0 <= box[1] < box[3] <= header.height):
            raise ValueError(f"the region {box} is not inside the picture of {header.width} x {header.height} pixels")
        return self._decode(container, frames, box, progress, seconds)

    def _decode(
        self, container: Container, frames: range, box: Box, progress: Progress, seconds: dict[str, float]
    ) -> Iterator[np.ndarray]:
        header, tile, done, count = container.header, container.header.tile, 0, 0
        # The tiles next to the region take part in blending its seams.
        rows = range(max(0, box[1] // tile - 1), min(header.tiles[0], -(-box[3] // tile) + 1))
        columns = range(max(0, box[0] // tile - 1), min(header.tiles[1], -(-box[2] // tile) + 1))
        groups = list(header.groups(rows, columns))
        inner = box[0] - columns.start * tile, box[1] - rows.start * tile
        inner_box = (*inner, inner[0] + box[2] - box[0], inner[1] + box[3] - box[1])
        first, last = frames.start // header.gop, -(-frames.stop // header.gop)
        together = max(1, groups_at_once(self.prior, header) // len(groups))

        def tell() -> None:
            progress(*((count, len(groups)) if header.clip is None else (done, len(frames))))

        for start in range(first, last, together):
            gops = range(start, min(start + together, last))
            wanted = [
                range(max(frames.start - gop * header.gop, 0), min(frames.stop - gop * header.gop, header.gop))
                for gop in gops
            ]
            # Tokens of later frames say nothing about these.
            needed = max(part.stop for part in wanted) if self.tokenizer.config.causal else header.gop
            tiles = len(gops), len(rows), len(columns)
            bits_GRCNL = torch.zeros(*tiles, needed * header.frame_tokens, header.bits, dtype=torch.bool)
            known_GRC = torch.zeros(tiles, dtype=torch.bool)
            numbers = [
                (gop * header.gop_groups + number, len(down) * len(right))
                for gop in gops
                for number, down, right in groups
            ]
            decoded = decode_groups(self.prior, container, numbers, needed, self.batch, seconds, tell)
            for place, bits_BNL in decoded:
                count += 1
                gop, (_, down, right) = place // len(groups), groups[place % len(groups)]
                group_RCNL = bits_BNL.unflatten(0, (len(down), len(right)))
                put(bits_GRCNL[gop], known_GRC[gop], group_RCNL, (down, right), rows, columns)
                tell()
            for bits_RCNL, known_RC, part in zip(bits_GRCNL, known_GRC, wanted, strict=True):
                began = time.perf_counter()
                pixels_CTHW = self._pixels.picture(bits_RCNL, known_RC, needed, inner_box, tell)
                seconds["tokenizer"] = seconds.get("tokenizer", 0.0) + time.perf_counter() - began
                for frame in part:
                    done += 1
                    tell()
                    yield pixels_CTHW[:, frame].permute(1, 2, 0).contiguous().numpy()

    def _check_models(self, header: Header) -> None:
        section = self.tokenizer.config
        if header.coding == PRIOR and self.prior is None:
            raise ValueError(f"the file was written with the prior {header.prior.hex()}; give that model")
        if header.coding == RAW and self.prior is not None:
            raise ValueError("the file was written without a prior; give the tokenizer's model folder")
        for name, there, here in (
            ("tokenizer", header.tokenizer, self._tokenizer_id),
            ("prior", header.prior, self._prior_id),
        ):
            if there != here:
                raise ValueError(f"the file was written with the {name} {there.hex()}, this one is {here.hex()}")
        fits = (header.tile, header.patch, header.bits) == (
            section.image_size, section.patch_size, self.tokenizer.quantizer.bits
        )  # fmt: skip
        fits = fits and (header.clip is None or header.gop == section.frames)
        fits = fits and (header.clip is not None or section.frames == 1 or section.causal)
        if not fits or header.group > group_size(self.prior):
            raise ValueError("the file is damaged: its tiles, tokens or frames are not those of the models it names")


def _gops(frames: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    gathered: list[np.ndarray] = []
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"frames must be uint8 (H, W, 3), got {frame.dtype} {frame.shape}")
        if gathered and frame.shape != gathered[0].shape:
            raise ValueError("the frames of a clip must all have one size")
        gathered.append(frame)
        if len(gathered) == size:
            yield np.stack(gathered)
            gathered = []
    if gathered:
        yield np.stack(gathered)


def _short_id(model: Tokenizer | Prior) -> bytes:
    if model.model_id is None:
        raise ValueError("the codec needs models that were read from a model folder: files carry the models' ids")
    return bytes.fromhex(model.model_id)[:8]
