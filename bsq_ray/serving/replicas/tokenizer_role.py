"""The tokenizer of a replica: encodes images and videos to tokens, and decodes them.

    image file ─prepare─▶ pixels ─encode─▶ tokens ─decode─▶ pixels ─▶ PNG      in batches
    the same, for models with local attention: at the size of the image        one at a time
    video file ─▶ VideoEngine: a few frames at a time, between image batches

Image files are decoded in the event loop's thread pool. PyTorch runs only in the replica's model threads.

Shape suffixes: B batch, N tokens, P values of a patch, C channels, L bits of a token, H and W pixels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config, model_folder
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.serving.deadline import deadline_after
from bsq_ray.serving.media.image_io import png_from_pixels, read_uploaded_image
from bsq_ray.serving.media.video_io import is_video
from bsq_ray.serving.payloads import MediaFile, PackedTokens
from bsq_ray.serving.replicas.model_metadata import tokenizer_fields
from bsq_ray.serving.replicas.model_thread import ModelThread, example_values, set_num_threads
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime
from bsq_ray.serving.replicas.video_engine import VideoEngine
from bsq_ray.serving.replicas.whole_images import WholeImageEngine

# Videos that one replica processes concurrently, a few frames of each in turn.
_MAX_CONCURRENT_VIDEOS = 4
# Images and frames of any size are computed in the thread of the batches up to so many pixels at a time, others in that
# of the codec.
_MAX_SMALL_PIXELS = 2**18


class TokenizerEngine:
    """Converts images to tokens and back; the result of an image does not depend on its batch.

    Attributes:
        video: engine for videos, one at a time.
        grid_size: number of rows, and of columns, of tokens.
    """

    def __init__(self, url: str, runtime: ReplicaRuntime) -> None:
        limits, device, max_batch_size = runtime.limits, runtime.device, runtime.batching.max_batch_size
        self.tokenizer = Tokenizer.from_pretrained(url).to(device)
        run_config = config.require_stage(model_folder.load_model_folder_config(url), config.TokenizerConfig, url)
        self._resize_filter = run_config.data.eval_interpolation
        self._max_pixels, self._device = limits.max_pixels, device
        self.video = VideoEngine(self.tokenizer, self._resize_filter, limits=limits, device=device)
        model_config = self.tokenizer.config
        self.grid_size = model_config.grid_size
        architecture = model_config.model_dump_json()
        images_BCHW = example_values(max_batch_size, 3, model_config.image_size, model_config.image_size)
        bits_BNL = example_values(max_batch_size, self.grid_size**2, self.tokenizer.quantizer.bits) > 0
        self._batched_encode = self._batched_decode = None
        # Images of any size have no batches.
        if not model_config.has_local_attention:
            self._batched_encode = runtime.make_runner(self._features_and_bits, architecture, images_BCHW)
            self._batched_decode = runtime.make_runner(self._decode_bits, architecture, bits_BNL)

    def prepare(self, data: bytes) -> np.ndarray:
        """Decode, resize and crop an image file as in evaluation; return square uint8 pixels (3, H, W).

        Raises:
            ApiError: see `read_uploaded_image`.
        """
        size = self.tokenizer.config.image_size
        return eval_transform(read_uploaded_image(data, self._max_pixels), size, self._resize_filter)

    def encode(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Encode pixels (3, H, W) to packed bits (N, ceil(L / 8)), uint8."""
        assert self._batched_encode is not None
        images_BCHW = to_float(torch.from_numpy(np.stack(images)))
        bits_BNL = self._batched_encode(images_BCHW)[..., -self.tokenizer.quantizer.bits :] > 0
        return list(pack_bits(bits_BNL).cpu().numpy())

    def decode(self, packed: list[np.ndarray]) -> list[np.ndarray]:
        """Decode packed bits (N, ceil(L / 8)) to uint8 pixels (3, H, W)."""
        assert self._batched_decode is not None
        bits_BNL = unpack_bits(torch.from_numpy(np.stack(packed)), self.tokenizer.quantizer.bits)
        images_BCHW = to_uint8(self._batched_decode(bits_BNL))
        return list(images_BCHW.cpu().numpy())

    @torch.no_grad()
    def _features_and_bits(self, images_BCHW: Tensor) -> Tensor:
        """Return features and bits, (B, N, C + L); calibration needs the features, because bits hide differences."""
        v_BNC = self.tokenizer.features(images_BCHW.to(self._device))
        return torch.cat([v_BNC, self.tokenizer.quantizer(v_BNC).bits_BNL.to(v_BNC.dtype)], -1)

    def _decode_bits(self, bits_BNL: Tensor) -> Tensor:
        return self.tokenizer.decode(Tokens(bits_BNL.to(self._device), (1, self.grid_size, self.grid_size)))


class TokenizerRole:
    """Encodes and decodes images and videos with one tokenizer.

    Attributes:
        tokenizer: the tokenizer.
    """

    def __init__(self, url: str, runtime: ReplicaRuntime) -> None:
        self._model_thread, self._timeout_s = runtime.batch_thread, runtime.limits.request_timeout_s
        self._engine: TokenizerEngine = self._model_thread.run_blocking(TokenizerEngine, url, runtime)
        self._video_threads = ThreadPoolExecutor(_MAX_CONCURRENT_VIDEOS, "video", lambda: set_num_threads(1))
        self._encode = self._model_thread.make_batcher(self._engine.encode, runtime.batching)
        self._decode = self._model_thread.make_batcher(self._engine.decode, runtime.batching)
        self.tokenizer = self._engine.tokenizer
        self._codec_thread, self._whole_images = runtime.codec_thread, None
        if self.tokenizer.config.has_local_attention:
            self._whole_images = WholeImageEngine(self.tokenizer, runtime.limits.max_pixels)

    async def metadata(self) -> dict[str, Any]:
        """Return the fields of this model in `GET /v1/models`."""
        return tokenizer_fields(self.tokenizer.config, self.tokenizer.model_id)

    async def encode(self, data: bytes) -> PackedTokens:
        """Encode an image or video file to tokens."""
        if is_video(data):
            tokens: PackedTokens = await self._run_on_video(self._engine.video.encode, data)
            return tokens
        if self._whole_images is not None:
            num_pixels = await asyncio.to_thread(self._whole_images.count_pixels, data)
            whole: PackedTokens = await self._run_on_whole(self._whole_images.encode, data, num_pixels)
            return whole
        packed: np.ndarray = await self._encode(await asyncio.to_thread(self._engine.prepare, data))
        return PackedTokens([1, self._engine.grid_size, self._engine.grid_size], packed.tobytes())

    async def decode(self, tokens: PackedTokens, media_type: str) -> MediaFile:
        """Decode tokens of an image to a PNG, or tokens of a video to a video of this media type."""
        if self._whole_images is not None and tokens.rate is None:
            num_pixels = self._whole_images.count_decoded_pixels(tokens)
            file: MediaFile = await self._run_on_whole(self._whole_images.decode, tokens, num_pixels)
            return file
        self._engine.video.check_tokens(tokens)
        if tokens.rate is None:
            bytes_per_token = -(-self.tokenizer.quantizer.bits // 8)
            packed_Nb = np.frombuffer(tokens.packed, np.uint8).reshape(-1, bytes_per_token)
            return self._png_file(await self._decode(packed_Nb))
        rate = Fraction(tokens.rate)
        video: MediaFile = await self._run_on_video(self._engine.video.decode, tokens, rate, media_type)
        return video

    async def reconstruct(self, data: bytes, media_type: str) -> MediaFile:
        """Encode and decode a file: an image to a PNG, a video to a video of this media type."""
        if is_video(data):
            video: MediaFile = await self._run_on_video(self._engine.video.reconstruct, data, media_type)
            return video
        if self._whole_images is not None:
            num_pixels = await asyncio.to_thread(self._whole_images.count_pixels, data)
            file: MediaFile = await self._run_on_whole(self._whole_images.reconstruct, data, num_pixels)
            return file
        original = await asyncio.to_thread(self._engine.prepare, data)
        reconstructed = await self._decode(await self._encode(original))
        # NumPy instead of `metrics.psnr`, because PyTorch must not run outside the model threads.
        mse = float(np.square(original.astype(np.float32) - reconstructed).mean())
        return self._png_file(reconstructed, float(10 * np.log10(255**2 / max(mse, 255**2 * 1e-10))))

    def _png_file(self, pixels_CHW: np.ndarray, psnr: float | None = None) -> MediaFile:
        return MediaFile(png_from_pixels(pixels_CHW), "image/png", pixels_CHW[0].size, psnr=psnr)

    async def _run_on_whole(self, function: Callable[..., Any], item: bytes | PackedTokens, num_pixels: int) -> Any:
        """Call a method of the engine for images of any size."""
        with deadline_after(self._timeout_s) as deadline:
            return await self._thread_for(num_pixels)(function, item, deadline)

    def _run_chunk(self, num_pixels: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Compute a few frames of a video."""
        return self._thread_for(num_pixels).run_blocking(function, *arguments)

    def _thread_for(self, num_pixels: int) -> ModelThread:
        """Return the thread for images of any size: large ones do not delay small ones and batches."""
        is_large = self._whole_images is not None and num_pixels > _MAX_SMALL_PIXELS
        return self._codec_thread if is_large else self._model_thread

    async def _run_on_video(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a video engine method in a separate thread, which runs a few frames at a time in a model thread."""
        loop = asyncio.get_running_loop()
        with deadline_after(self._timeout_s) as deadline:
            call = partial(function, *arguments, run_in_model_thread=self._run_chunk, deadline=deadline)
            return await loop.run_in_executor(self._video_threads, call)
