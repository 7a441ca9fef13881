"""The models behind the deployments, as plain objects: files and numbers in, files and numbers out.

    TokenizerEngine   image file ─prepare─▶ pixels ─encode─▶ tokens ─decode─▶ pixels     in exact batches
    CodecEngine       image or video ─compress─▶ .bsq ─decompress─▶ PNG or video         one after the other
    GeneratorEngine   class ─draw, step by step─▶ PNGs; forward passes of many requests  in exact batches

Shape suffixes: B batch, N tokens, L bits of a token, S sub-tokens, C channels or classes, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from bsq_ray import config, model_folder
from bsq_ray.codec.codec import Codec
from bsq_ray.codec.container import read_header
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.models.generator import Generator
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer, Tokens, patchify
from bsq_ray.serving.batch_invariance import ExactBatches
from bsq_ray.serving.deadline import Work
from bsq_ray.serving.errors import Refused
from bsq_ray.serving.image_quality import Figures, measure
from bsq_ray.serving.media.image_io import animated, png, png_of, read_image
from bsq_ray.serving.media.video_io import check_length, is_clip, read_clip, written
from bsq_ray.serving.payloads import BSQ, File
from bsq_ray.serving.replicas.video_engine import ClipEngine
from bsq_ray.serving.service_config import Limits

Predict = Callable[[Tensor, Tensor], Tensor]
Decode = Callable[[Tensor], Tensor]


def use_threads(count: int) -> None:
    """Threads of PyTorch in this process; 0 is one for each core."""
    torch.set_num_threads(count or os.cpu_count() or 1)


class TokenizerEngine:
    """Images to tokens and back; what an image gets does not depend on its batch.

    Attributes:
        clips: the same for clips, one at a time.
    """

    def __init__(self, url: str, device: str, largest_batch: int, limits: Limits) -> None:
        self.tokenizer = Tokenizer.from_pretrained(url).to(device)
        run = config.expect(model_folder.load_model_folder_config(url), config.TokenizerConfig, url)
        self._filter, self._max_pixels, self._device = run.data.evaluation_filter, limits.pixels, device
        self.clips = ClipEngine(self.tokenizer, self._filter, limits, device)
        section = self.tokenizer.config
        self.side = section.image_size // section.patch_size
        images_BCHW = _example(largest_batch, 3, section.image_size, section.image_size)
        self._encode = ExactBatches(self._features_and_bits, images_BCHW, cores=_cores(device))
        bits_BNL = _example(largest_batch, self.side**2, self.tokenizer.quantizer.bits) > 0
        self._decode = ExactBatches(self._pixels, bits_BNL, cores=_cores(device))

    def facts(self) -> dict[str, Any]:
        """What the list of models says of it."""
        section, bits = self.tokenizer.config, self.tokenizer.quantizer.bits
        return {
            "tokenizer_id": self.tokenizer.model_id,
            "image_size": section.image_size,
            "grid": [1, self.side, self.side],
            "bits": bits,
            "bits_per_pixel": bits / section.patch_size**2,
        }

    def prepare(self, data: bytes) -> np.ndarray:
        """An image file as the model takes it, resized and cropped as in the evaluation: uint8 (3, S, S).

        Raises:
            Refused: see `read_image`.
        """
        size = self.tokenizer.config.image_size
        return eval_transform(read_image(data, self._max_pixels, size), size, self._filter)

    def encode(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Pixels (3, S, S) to packed bits (N, ceil(L / 8)), uint8."""
        images_BCHW = to_float(torch.from_numpy(np.stack(images)))
        bits_BNL = self._encode(images_BCHW)[..., -self.tokenizer.quantizer.bits :] > 0
        return list(pack_bits(bits_BNL).cpu().numpy())

    def decode(self, packed: list[np.ndarray]) -> list[np.ndarray]:
        """Packed bits to pixels, the inverse of `encode`."""
        bits_BNL = unpack_bits(torch.from_numpy(np.stack(packed)), self.tokenizer.quantizer.bits)
        images_BCHW = to_uint8(self._decode(bits_BNL))
        return list(images_BCHW.cpu().numpy())

    def check_tokens(self, grid: list[int], packed: bytes) -> np.ndarray:
        """Tokens of an image, or of all frames of a clip, from a request, as `decode` takes them.

        Raises:
            Refused: 422 they are not of this model.
        """
        tokens, width = self.side**2, -(-self.tokenizer.quantizer.bits // 8)
        if grid[1:] != [self.side, self.side] or grid[0] < 1 or len(packed) != grid[0] * tokens * width:
            raise Refused(
                422,
                f"this model takes the grid [frames, {self.side}, {self.side}] and for each frame {tokens} tokens of "
                f"{width} bytes",
            )
        return np.frombuffer(packed, np.uint8).reshape(-1, width)

    @torch.no_grad()
    def _features_and_bits(self, images_BCHW: Tensor) -> Tensor:
        """(B, N, …): features, in which every difference shows, and the bits made of them."""
        patches_BNP = patchify(images_BCHW.to(self._device).unsqueeze(2), self.tokenizer.config.patch_size)
        v_BNC = self.tokenizer.to_code(self.tokenizer.encoder(patches_BNP))
        return torch.cat([v_BNC, self.tokenizer.quantizer(v_BNC).bits_BNL.to(v_BNC.dtype)], -1)

    def _pixels(self, bits_BNL: Tensor) -> Tensor:
        return self.tokenizer.decode(Tokens(bits_BNL.to(self._device), (1, self.side, self.side)))


class CodecEngine:
    """Images and clips of any size to .bsq files and back, one request after the other, each until its time is up."""

    def __init__(self, url: str, device: str, limits: Limits) -> None:
        self.codec = Codec.from_pretrained(url, device=device)
        self._raw = Codec(self.codec.tokenizer)
        self._limits, self._tile = limits, self.codec.tokenizer.config.image_size

    def facts(self) -> dict[str, Any]:
        """What the list of models says of it."""
        prior = self.codec.prior
        return {"tokenizer_id": self.codec.tokenizer.model_id, "prior_id": prior.model_id if prior else None}

    def compress(self, data: bytes, work: Work) -> File:
        """An image or video file to a .bsq file.

        Raises:
            Refused: see `read_image` and `read_clip`; 422 this model does not take it; 503 when its time is up.
        """
        work.check()
        try:
            if is_clip(data):
                video = read_clip(data, self._limits, self._tile**2)
                coded = self.codec.compress_clip(video.frames, video.frame_rate, video.color, work.check)
            else:
                coded = self.codec.compress(read_image(data, self._limits.pixels), work.check)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        pixels = round(8 * len(coded.data) / coded.bits_per_pixel)
        return File(coded.data, BSQ, pixels, coded.num_frames if is_clip(data) else None)

    def decompress(self, data: bytes, media_type: str, work: Work) -> File:
        """A .bsq file to a PNG, or to a video of this media type.

        Raises:
            Refused: 413 the clip is too long, 422 damaged or of other models, 503 when its time is up.
        """
        work.check()
        most = self._limits.pixels
        try:
            header = read_header(data, most)
            if header.clip is None:
                image = self.codec.decompress(data, max_pixels=most, on_progress=work.check)
                return File(png_of(image), "image/png", image.width * image.height)
            pixels = header.width * header.height
            check_length(header.num_frames, max(pixels, self._tile**2), self._limits)
            frames = self.codec.decompress_clip(data, max_pixels=most, on_progress=work.check)
            file, count = written(frames, media_type, header.clip.frame_rate, header.clip.color)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        return File(file, media_type, count * pixels, count)

    def measure(self, data: bytes, work: Work) -> Figures:
        """Rate and quality of an image file beside JPEG and WebP at equal quality.

        Raises:
            Refused: as `compress`; 415 a video.
        """
        work.check()
        if is_clip(data):
            raise Refused(415, "the body is a video; only images are measured")
        image = read_image(data, self._limits.pixels)
        size = len(self.codec.compress(image, work.check).data)
        # The prior loses nothing, so the picture need not go through it.
        raw = self._raw.compress(image, work.check).data
        shown = self._raw.decompress(raw, max_pixels=self._limits.pixels, on_progress=work.check)
        return measure(image, shown, size, work.check)


class GeneratorEngine:
    """Draws images of classes; the forward passes of several requests can be computed together."""

    def __init__(self, url: str, device: str, largest_batch: int, most_steps: int) -> None:
        self.generator = Generator.from_pretrained(url, device=device)
        self._device, self._most_steps = device, most_steps
        model = self.generator.model
        tokens_BNS = torch.randint(
            0, model.mask_token + 1, (largest_batch, model.config.tokens, model.config.sub_tokens)
        )
        classes_BC = model.class_weights(torch.full((largest_batch,), model.null_class))
        self._together = ExactBatches(self._forward, tokens_BNS, classes_BC, cores=_cores(device))

    def facts(self) -> dict[str, Any]:
        """What the list of models says of it."""
        generator = self.generator
        return {
            "model_id": generator.model.model_id,
            "tokenizer_id": generator.tokenizer.model_id,
            "image_size": generator.tokenizer.config.image_size,
            "classes": generator.model.config.classes,
            "steps": generator.sampling.steps,
            "guidance": generator.sampling.guidance,
        }

    def check(self, label: int, changes: dict[str, Any]) -> None:
        """Refuses before anything is drawn what `draw` would fail at.

        Raises:
            Refused: 422 an unknown class or an invalid value.
        """
        try:
            self.generator.model.class_weights(torch.tensor([label]))
            section = config.Sampling.model_validate(self.generator.sampling.model_dump() | changes)
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(422, f"{first['loc'][0]}: {first['msg']}") from None
        except ValueError as error:
            raise Refused(422, str(error)) from None
        if section.steps > self._most_steps:
            raise Refused(422, f"steps: at most {self._most_steps} are taken")

    def draw(self, label: int, seed: int, changes: dict[str, Any], predict: Predict, decode: Decode) -> Iterator[bytes]:
        """A PNG, or an animated WebP of a clip, after each step, masked parts grey; the last one is the image."""
        for images in self.generator.iter_steps([label], seed, predict, decode, **changes):
            pixels = to_uint8(images)[0].cpu().numpy()
            yield png(pixels) if pixels.ndim == 3 else animated(pixels)

    def forward(self, requests: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Logits for the rows (sub-tokens, classes) of several requests."""
        tokens_BNS = torch.cat([tokens for tokens, _ in requests])
        classes_BC = torch.cat([classes for _, classes in requests])
        logits_BNSV = self._together(tokens_BNS, classes_BC)
        return list(logits_BNSV.split([len(tokens) for tokens, _ in requests]))

    def decode(self, bits_BNL: Tensor) -> Tensor:
        """Images of tokens, (B, 3, H, W)."""
        return self.generator.decode(bits_BNL)

    @torch.no_grad()
    def _forward(self, tokens_BNS: Tensor, classes_BC: Tensor) -> Tensor:
        logits: Tensor = self.generator.model(tokens_BNS.to(self._device), classes_BC.to(self._device))
        return logits


def _cores(device: str) -> int:
    return torch.get_num_threads() if device == "cpu" else 1


def _example(*shape: int) -> Tensor:
    """Values in [-1, 1] that are the same everywhere."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
