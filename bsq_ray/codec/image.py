"""Images to bytes and back.

image ─tiles─▶ Tokenizer.encode ─▶ tokens ─prior and range coder, group by group─▶ container
container ─▶ groups ─▶ tokens ─checksum─▶ Tokenizer.decode, windows blended over seams ─▶ image
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bsq_ray import config, hub, storage
from bsq_ray.codec.container import MAX_PIXELS, PRIOR, RAW, Container, Header, read_container, write_container
from bsq_ray.codec.tiles import as_grid, cut, join
from bsq_ray.codec.tokens import Undecodable, decode_tokens, encode_tokens
from bsq_ray.models.prior import Prior
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer, Tokens

_GROUP, _TOLERANCE, _BATCH = 4, 14, 32
_GREY = 128


@dataclass(frozen=True)
class Compressed:
    """A file and what it consists of.

    Attributes:
        data: the file.
        bits_per_pixel: of the whole file.
        raw_bits: of the tokens before the prior.
        cross_entropy_bits, side_bits: of the tokens under the prior, and of the side information; 0 without a prior.
        seconds: by part: "tokenizer", "prior".
    """

    data: bytes
    bits_per_pixel: float
    raw_bits: int
    cross_entropy_bits: float
    side_bits: int
    seconds: dict[str, float]


class Codec:
    """Compresses images of any size with a tokenizer and, if there is one, a prior.

    Args:
        tokenizer: of single images.
        prior: trained on this tokenizer's tokens; None writes their bits as they are.
    """

    def __init__(self, tokenizer: Tokenizer, prior: Prior | None = None) -> None:
        if prior is not None:
            side = tokenizer.config.image_size // tokenizer.config.patch_size
            fits = prior.config.grid == (1, side, side) and prior.config.bits == tokenizer.quantizer.bits
            if not fits:
                raise ValueError("tokenizer and prior do not belong together: their tokens differ in number or bits")
        if tokenizer.config.frames > 1:
            raise ValueError("this version compresses images; the tokenizer is one of clips")
        self.tokenizer, self.prior = tokenizer.eval(), prior.eval() if prior else None
        self._tokenizer_id, self._prior_id = _short_id(tokenizer), _short_id(prior) if prior else bytes(8)

    @classmethod
    def from_pretrained(cls, url: str, weights: Literal["ema", "plain"] = "ema", device: str = "cpu") -> Codec:
        """Reads the model folder of a prior, whose `tokenizer/` is its tokenizer, or of a tokenizer alone.

        Raises:
            ValueError: there is no such folder, its parts do not belong together, or it holds another kind of model.
        """
        run = hub.read_model_folder(url, weights).config
        if isinstance(run, config.TokenizerConfig):
            return cls(Tokenizer.from_pretrained(url, weights).to(device))
        prior = Prior.from_pretrained(url, weights).to(device)
        return cls(Tokenizer.from_pretrained(storage.join(url, "tokenizer")).to(device), prior)

    def compress(self, image: Image.Image) -> Compressed:
        """Compresses an image; transparency is laid on white, other modes become RGB."""
        pixels_CHW = _pixels(image)
        section = self.tokenizer.config
        header = Header(
            mode=PRIOR if self.prior else RAW,
            width=pixels_CHW.shape[2],
            height=pixels_CHW.shape[1],
            tile=section.image_size,
            patch=section.patch_size,
            bits=self.tokenizer.quantizer.bits,
            group=_GROUP,
            tolerance=_TOLERANCE,
            tokenizer=self._tokenizer_id,
            prior=self._prior_id,
        )
        began = time.perf_counter()
        tiles = cut(pixels_CHW, section.image_size)
        bits_RCNL = self._encode(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        middle = time.perf_counter()
        payloads, checks, nats, side = [], [], 0.0, 0
        for rows, columns in header.groups:
            group_BNL = bits_RCNL[rows.start : rows.stop, columns.start : columns.stop].flatten(0, 1)
            checks.append(_checksum(group_BNL))
            if self.prior is None:
                payloads.append(pack_bits(group_BNL.flatten()).numpy().tobytes())
                continue
            coded = encode_tokens(self.prior, group_BNL, 2.0**-_TOLERANCE)
            payloads.append(coded.data)
            nats, side = nats + coded.cross_entropy, side + coded.side
        data = write_container(header, payloads, checks)
        seconds = {"tokenizer": middle - began, "prior": time.perf_counter() - middle}
        bits_per_pixel = 8 * len(data) / (header.width * header.height)
        return Compressed(data, bits_per_pixel, bits_RCNL.numel(), nats, side, seconds)

    def decompress(
        self, data: bytes, region: tuple[int, int, int, int] | None = None, max_pixels: int = MAX_PIXELS
    ) -> Image.Image:
        """The image, or a part of it.

        Args:
            region: left, top, right and lower edge in pixels; only the groups that it touches are decoded.
            max_pixels: larger images are refused.

        Raises:
            ValueError: the file is damaged, of other models or a newer version, or the region is outside.
        """
        container = read_container(data, True, max_pixels)
        header = container.header
        box = region or (0, 0, header.width, header.height)
        if not (0 <= box[0] < box[2] <= header.width and 0 <= box[1] < box[3] <= header.height):
            raise ValueError(f"the region {box} is not inside the image of {header.width} x {header.height} pixels")
        return self._image(container, box)

    def preview(self, data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, float]:
        """What the first part of a file shows already, grey where the rest is missing, and which share of it is there.

        Raises:
            ValueError: the part ends before the index does, or is damaged.
        """
        container = read_container(data, False, max_pixels)
        header = container.header
        there = sum(payload is not None for payload in container.payloads) / len(container.payloads)
        return self._image(container, (0, 0, header.width, header.height)), there

    def _image(self, container: Container, box: tuple[int, int, int, int]) -> Image.Image:
        header = container.header
        self._check_models(header)
        tile, side = header.tile, header.tile // header.patch
        # Half a tile around the region takes part in blending its seams.
        first_row, last_row = max(0, box[1] // tile - 1), min(header.tiles[0], -(-box[3] // tile) + 1)
        first_column, last_column = max(0, box[0] // tile - 1), min(header.tiles[1], -(-box[2] // tile) + 1)
        rows, columns = last_row - first_row, last_column - first_column
        bits_RCNL = torch.zeros(rows, columns, header.tile_tokens, header.bits, dtype=torch.bool)
        known_RC = torch.zeros(rows, columns, dtype=torch.bool)
        for (group_rows, group_columns), payload, check in zip(
            header.groups, container.payloads, container.checks, strict=True
        ):
            apart = group_rows.stop <= first_row or group_rows.start >= last_row
            apart = apart or group_columns.stop <= first_column or group_columns.start >= last_column
            if apart or payload is None:
                continue
            shape = len(group_rows), len(group_columns)
            group_RCNL = self._tokens(header, payload, check, shape)
            for place_row, row in enumerate(group_rows):
                for place_column, column in enumerate(group_columns):
                    if first_row <= row < last_row and first_column <= column < last_column:
                        bits_RCNL[row - first_row, column - first_column] = group_RCNL[place_row, place_column]
                        known_RC[row - first_row, column - first_column] = True
        images_CHW = join(as_grid(bits_RCNL), side, header.patch, self._decode)
        pixels_CHW = ((images_CHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        known_HW = known_RC.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        pixels_CHW = torch.where(known_HW, pixels_CHW, torch.full_like(pixels_CHW, _GREY))
        left, top = box[0] - first_column * tile, box[1] - first_row * tile
        part = pixels_CHW[:, top : top + box[3] - box[1], left : left + box[2] - box[0]]
        return Image.fromarray(part.permute(1, 2, 0).contiguous().numpy())

    def _tokens(self, header: Header, payload: bytes, check: int, shape: tuple[int, int]) -> Tensor:
        tiles = shape[0] * shape[1]
        bits_BNL: Tensor | None
        if self.prior is None:
            count = tiles * header.tile_tokens * header.bits
            packed = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
            if len(packed) != -(-count // 8):
                raise ValueError("the file is damaged: a group has not the length that its tokens need")
            bits_BNL = unpack_bits(packed, count).view(tiles, header.tile_tokens, header.bits)
        else:
            try:
                bits_BNL = decode_tokens(self.prior, payload, tiles)
            except Undecodable:
                bits_BNL = None
        if bits_BNL is None or _checksum(bits_BNL) != check:
            raise ValueError(
                "the decoded tokens do not match their checksum: the file is damaged, or this machine's logits differ "
                f"from the encoder's by more than the 2^-{header.tolerance} that the file allows for"
            )
        return bits_BNL.unflatten(0, shape)

    def _check_models(self, header: Header) -> None:
        section = self.tokenizer.config
        if header.mode == PRIOR and self.prior is None:
            raise ValueError(f"the file was written with the prior {header.prior.hex()}; give that model")
        if header.mode == RAW and self.prior is not None:
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
        if not fits:
            raise ValueError("the file is damaged: its tiles or tokens are not those of the tokenizer it names")

    def _encode(self, tiles_BCHW: Tensor) -> Tensor:
        device = self.tokenizer.last_layer.device
        parts = []
        for part in tiles_BCHW.split(_BATCH):
            parts.append(self.tokenizer.encode(part.to(device).float() / 127.5 - 1).bits_BNL.cpu())
        return torch.cat(parts)

    def _decode(self, bits_BNL: Tensor) -> Tensor:
        device, side = (
            self.tokenizer.last_layer.device,
            self.tokenizer.config.image_size // self.tokenizer.config.patch_size,
        )
        parts = [
            self.tokenizer.decode(Tokens(part.to(device), (1, side, side))).cpu() for part in bits_BNL.split(_BATCH)
        ]
        return torch.cat(parts)


def _short_id(model: Tokenizer | Prior) -> bytes:
    if model.model_id is None:
        raise ValueError("the codec needs models that were read from a model folder: files carry the models' ids")
    return bytes.fromhex(model.model_id)[:8]


def _checksum(bits_BNL: Tensor) -> int:
    return zlib.crc32(pack_bits(bits_BNL.flatten()).numpy().tobytes())


def _pixels(image: Image.Image) -> Tensor:
    from bsq_ray.data.images import to_rgb

    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
