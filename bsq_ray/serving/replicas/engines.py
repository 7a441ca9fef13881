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
from bsq_ray.serving.batch_invariance import BatchInvariantRunner
from bsq_ray.serving.deadline import Deadline
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.image_quality import QualityReport, measure_quality
from bsq_ray.serving.media.image_io import png_from_image, png_from_pixels, read_uploaded_image, webp_from_frames
from bsq_ray.serving.media.video_io import check_total_pixels, encode_video_file, is_video, read_uploaded_video
from bsq_ray.serving.payloads import BSQ_MEDIA_TYPE, MediaFile
from bsq_ray.serving.replicas.video_engine import VideoEngine
from bsq_ray.serving.service_config import Limits

Predict = Callable[[Tensor, Tensor], Tensor]
Decode = Callable[[Tensor], Tensor]


def set_num_threads(num_threads: int) -> None:
    """Threads of PyTorch in this process; 0 is one for each core."""
    torch.set_num_threads(num_threads or os.cpu_count() or 1)


class TokenizerEngine:
    """Images to tokens and back; what an image gets does not depend on its batch.

    Attributes:
        clips: the same for clips, one at a time.
    """

    def __init__(self, url: str, device: str, max_batch_size: int, limits: Limits) -> None:
        self.tokenizer = Tokenizer.from_pretrained(url).to(device)
        run_config = config.require_stage(model_folder.load_model_folder_config(url), config.TokenizerConfig, url)
        self._resize_filter, self._max_pixels, self._device = (
            run_config.data.eval_interpolation,
            limits.max_pixels,
            device,
        )
        self.video = VideoEngine(self.tokenizer, self._resize_filter, limits, device)
        model_config = self.tokenizer.config
        self.grid_size = model_config.image_size // model_config.patch_size
        images_BCHW = _example_values(max_batch_size, 3, model_config.image_size, model_config.image_size)
        self._batched_encode = BatchInvariantRunner(self._features_and_bits, images_BCHW, num_cores=_num_cores(device))
        bits_BNL = _example_values(max_batch_size, self.grid_size**2, self.tokenizer.quantizer.bits) > 0
        self._batched_decode = BatchInvariantRunner(self._decode_bits, bits_BNL, num_cores=_num_cores(device))

    def metadata(self) -> dict[str, Any]:
        """What the list of models says of it."""
        model_config, bits = self.tokenizer.config, self.tokenizer.quantizer.bits
        return {
            "tokenizer_id": self.tokenizer.model_id,
            "image_size": model_config.image_size,
            "grid": [1, self.grid_size, self.grid_size],
            "bits": bits,
            "bits_per_pixel": bits / model_config.patch_size**2,
        }

    def prepare(self, data: bytes) -> np.ndarray:
        """An image file as the model takes it, resized and cropped as in the evaluation: uint8 (3, S, S).

        Raises:
            Refused: see `read_image`.
        """
        size = self.tokenizer.config.image_size
        return eval_transform(read_uploaded_image(data, self._max_pixels, size), size, self._resize_filter)

    def encode(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Pixels (3, S, S) to packed bits (N, ceil(L / 8)), uint8."""
        images_BCHW = to_float(torch.from_numpy(np.stack(images)))
        bits_BNL = self._batched_encode(images_BCHW)[..., -self.tokenizer.quantizer.bits :] > 0
        return list(pack_bits(bits_BNL).cpu().numpy())

    def decode(self, packed: list[np.ndarray]) -> list[np.ndarray]:
        """Packed bits to pixels, the inverse of `encode`."""
        bits_BNL = unpack_bits(torch.from_numpy(np.stack(packed)), self.tokenizer.quantizer.bits)
        images_BCHW = to_uint8(self._batched_decode(bits_BNL))
        return list(images_BCHW.cpu().numpy())

    def parse_tokens(self, grid: list[int], packed: bytes) -> np.ndarray:
        """Tokens of an image, or of all frames of a clip, from a request, as `decode` takes them.

        Raises:
            Refused: 422 they are not of this model.
        """
        num_tokens, bytes_per_token = self.grid_size**2, -(-self.tokenizer.quantizer.bits // 8)
        if (
            grid[1:] != [self.grid_size, self.grid_size]
            or grid[0] < 1
            or len(packed) != grid[0] * num_tokens * bytes_per_token
        ):
            raise ApiError(
                422,
                f"this model takes the grid [frames, {self.grid_size}, {self.grid_size}] and for each frame {num_tokens} tokens of "
                f"{bytes_per_token} bytes",
            )
        return np.frombuffer(packed, np.uint8).reshape(-1, bytes_per_token)

    @torch.no_grad()
    def _features_and_bits(self, images_BCHW: Tensor) -> Tensor:
        """(B, N, …): features, in which every difference shows, and the bits made of them."""
        patches_BNP = patchify(images_BCHW.to(self._device).unsqueeze(2), self.tokenizer.config.patch_size)
        v_BNC = self.tokenizer.to_code(self.tokenizer.encoder(patches_BNP))
        return torch.cat([v_BNC, self.tokenizer.quantizer(v_BNC).bits_BNL.to(v_BNC.dtype)], -1)

    def _decode_bits(self, bits_BNL: Tensor) -> Tensor:
        return self.tokenizer.decode(Tokens(bits_BNL.to(self._device), (1, self.grid_size, self.grid_size)))


class CodecEngine:
    """Images and clips of any size to .bsq files and back, one request after the other, each until its time is up."""

    def __init__(self, url: str, device: str, limits: Limits) -> None:
        self.codec = Codec.from_pretrained(url, device=device)
        self._codec_without_prior = Codec(self.codec.tokenizer)
        self._limits, self._tile_size = limits, self.codec.tokenizer.config.image_size

    def metadata(self) -> dict[str, Any]:
        """What the list of models says of it."""
        prior = self.codec.prior
        return {"tokenizer_id": self.codec.tokenizer.model_id, "prior_id": prior.model_id if prior else None}

    def compress(self, data: bytes, deadline: Deadline) -> MediaFile:
        """An image or video file to a .bsq file.

        Raises:
            Refused: see `read_image` and `read_clip`; 422 this model does not take it; 503 when its time is up.
        """
        deadline.check()
        try:
            if is_video(data):
                video = read_uploaded_video(data, self._limits, self._tile_size**2)
                encoded = self.codec.compress_clip(video.frames, video.frame_rate, video.color, deadline.check)
            else:
                encoded = self.codec.compress(read_uploaded_image(data, self._limits.max_pixels), deadline.check)
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        num_pixels = round(8 * len(encoded.data) / encoded.bits_per_pixel)
        return MediaFile(encoded.data, BSQ_MEDIA_TYPE, num_pixels, encoded.num_frames if is_video(data) else None)

    def decompress(self, data: bytes, media_type: str, deadline: Deadline) -> MediaFile:
        """A .bsq file to a PNG, or to a video of this media type.

        Raises:
            Refused: 413 the clip is too long, 422 damaged or of other models, 503 when its time is up.
        """
        deadline.check()
        max_pixels = self._limits.max_pixels
        try:
            header = read_header(data, max_pixels)
            if header.clip is None:
                image = self.codec.decompress(data, max_pixels=max_pixels, on_progress=deadline.check)
                return MediaFile(png_from_image(image), "image/png", image.width * image.height)
            pixels_per_frame = header.width * header.height
            check_total_pixels(header.num_frames, max(pixels_per_frame, self._tile_size**2), self._limits)
            frames = self.codec.decompress_clip(data, max_pixels=max_pixels, on_progress=deadline.check)
            file, num_frames = encode_video_file(frames, media_type, header.clip.frame_rate, header.clip.color)
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        return MediaFile(file, media_type, num_frames * pixels_per_frame, num_frames)

    def measure(self, data: bytes, deadline: Deadline) -> QualityReport:
        """Rate and quality of an image file beside JPEG and WebP at equal quality.

        Raises:
            Refused: as `compress`; 415 a video.
        """
        deadline.check()
        if is_video(data):
            raise ApiError(415, "the body is a video; only images are measured")
        image = read_uploaded_image(data, self._limits.max_pixels)
        num_bytes = len(self.codec.compress(image, deadline.check).data)
        # The prior loses nothing, so the picture need not go through it.
        coded_without_prior = self._codec_without_prior.compress(image, deadline.check).data
        decoded = self._codec_without_prior.decompress(
            coded_without_prior, max_pixels=self._limits.max_pixels, on_progress=deadline.check
        )
        return measure_quality(image, decoded, num_bytes, deadline.check)


class GeneratorEngine:
    """Draws images of classes; the forward passes of several requests can be computed together."""

    def __init__(self, url: str, device: str, max_batch_size: int, max_steps: int) -> None:
        self.generator = Generator.from_pretrained(url, device=device)
        self._device, self._max_steps = device, max_steps
        model = self.generator.model
        tokens_BNS = torch.randint(
            0, model.mask_token + 1, (max_batch_size, model.config.num_tokens, model.config.num_sub_tokens)
        )
        classes_BC = model.class_weights(torch.full((max_batch_size,), model.null_class))
        self._batched_forward = BatchInvariantRunner(
            self._forward, tokens_BNS, classes_BC, num_cores=_num_cores(device)
        )

    def metadata(self) -> dict[str, Any]:
        """What the list of models says of it."""
        generator = self.generator
        return {
            "model_id": generator.model.model_id,
            "tokenizer_id": generator.tokenizer.model_id,
            "image_size": generator.tokenizer.config.image_size,
            "classes": generator.model.config.num_classes,
            "steps": generator.sampling.steps,
            "guidance": generator.sampling.guidance_scale,
        }

    def check_request(self, label: int, sampling_overrides: dict[str, Any]) -> None:
        """Refuses before anything is drawn what `draw` would fail at.

        Raises:
            Refused: 422 an unknown class or an invalid value.
        """
        try:
            self.generator.model.class_weights(torch.tensor([label]))
            sampling = config.SamplingConfig.model_validate(self.generator.sampling.model_dump() | sampling_overrides)
        except ValidationError as error:
            first_error = error.errors()[0]
            raise ApiError(422, f"{first_error['loc'][0]}: {first_error['msg']}") from None
        except ValueError as error:
            raise ApiError(422, str(error)) from None
        if sampling.steps > self._max_steps:
            raise ApiError(422, f"steps: at most {self._max_steps} are taken")

    def generate_steps(
        self, label: int, seed: int, sampling_overrides: dict[str, Any], predict: Predict, decode: Decode
    ) -> Iterator[bytes]:
        """A PNG, or an animated WebP of a clip, after each step, masked parts grey; the last one is the image."""
        for images in self.generator.iter_steps([label], seed, predict, decode, **sampling_overrides):
            pixels = to_uint8(images)[0].cpu().numpy()
            yield png_from_pixels(pixels) if pixels.ndim == 3 else webp_from_frames(pixels)

    def forward(self, requests: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Logits for the rows (sub-tokens, classes) of several requests."""
        tokens_BNS = torch.cat([tokens for tokens, _ in requests])
        classes_BC = torch.cat([classes for _, classes in requests])
        logits_BNSV = self._batched_forward(tokens_BNS, classes_BC)
        return list(logits_BNSV.split([len(tokens) for tokens, _ in requests]))

    def decode(self, bits_BNL: Tensor) -> Tensor:
        """Images of tokens, (B, 3, H, W)."""
        return self.generator.decode(bits_BNL)

    @torch.no_grad()
    def _forward(self, tokens_BNS: Tensor, classes_BC: Tensor) -> Tensor:
        logits: Tensor = self.generator.model(tokens_BNS.to(self._device), classes_BC.to(self._device))
        return logits


def _num_cores(device: str) -> int:
    return torch.get_num_threads() if device == "cpu" else 1


def _example_values(*shape: int) -> Tensor:
    """Values in [-1, 1] that are the same everywhere."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
