"""Replicas that hold a model: what Ray Serve starts, scales and replaces.

    request ─▶ threads that read files ─▶ batch ─▶ the one thread that computes ─▶ answer

Everything PyTorch computes runs in one thread of a replica, so its cores are used by one computation at a time.
Batches form while the one before is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from ray.serve.metrics import Histogram
from torch import Tensor

from bsq_ray.serving.batching import DynamicBatcher
from bsq_ray.serving.deadline import deadline_after
from bsq_ray.serving.image_quality import QualityReport
from bsq_ray.serving.media.image_io import png_from_pixels
from bsq_ray.serving.media.video_io import is_video
from bsq_ray.serving.payloads import MediaFile, PackedTokens
from bsq_ray.serving.replicas.engines import CodecEngine, GeneratorEngine, TokenizerEngine, set_num_threads
from bsq_ray.serving.service_config import Batching, Settings

# Videos that a tokenizer's replica works on at once, a few frames of each in turn.
_MAX_CONCURRENT_VIDEOS = 4


class _ModelThread:
    """The thread of a replica in which its model computes."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, "model", lambda: set_num_threads(threads))

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def run_blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The same for a thread that waits."""
        return self._executor.submit(function, *arguments).result()

    def make_batcher(self, function: Callable[[list[Any]], list[Any]], batching: Batching) -> DynamicBatcher:
        """`function` of many as an awaitable function of one."""
        batch_size_histogram = Histogram(
            "serve_bsq_batch_size", "Requests computed together.", [1, 2, 4, 8, 16, 32, 64], ("function",)
        )

        async def run_batch(items: list[Any]) -> list[Any]:
            batch_size_histogram.observe(len(items), {"function": function.__name__})
            results: list[Any] = await self(function, items)
            return results

        return DynamicBatcher(run_batch, batching.max_batch_size, batching.batch_wait_timeout_ms / 1000)


class TokenizerReplica:
    """Encodes and decodes squares of the tokenizer's size, and clips of them."""

    def __init__(self, url: str, settings: Settings) -> None:
        replica_config = settings.tokenizer
        self._model_thread, self._timeout_s = _ModelThread(replica_config.threads), settings.limits.request_timeout_s
        arguments = url, replica_config.device, replica_config.max_batch_size, settings.limits
        self._engine: TokenizerEngine = self._model_thread.run_blocking(TokenizerEngine, *arguments)
        self._video_threads = ThreadPoolExecutor(_MAX_CONCURRENT_VIDEOS, "clip", lambda: set_num_threads(1))
        self._encode = self._model_thread.make_batcher(self._engine.encode, replica_config)
        self._decode = self._model_thread.make_batcher(self._engine.decode, replica_config)

    async def metadata(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.metadata()

    async def encode(self, data: bytes) -> PackedTokens:
        """An image or video file to its tokens."""
        if is_video(data):
            tokens: PackedTokens = await self._run_on_video(self._engine.video.encode, data)
            return tokens
        packed: np.ndarray = await self._encode(await asyncio.to_thread(self._engine.prepare, data))
        return PackedTokens([1, self._engine.grid_size, self._engine.grid_size], packed.tobytes())

    async def decode(self, tokens: PackedTokens, media_type: str) -> MediaFile:
        """Tokens to a PNG, or those of a clip to a video of this media type."""
        packed = self._engine.parse_tokens(tokens.grid, tokens.packed)
        if tokens.rate is None:
            return self._png_file(await self._decode(packed))
        video: MediaFile = await self._run_on_video(
            self._engine.video.decode, packed, Fraction(tokens.rate), media_type
        )
        return video

    async def reconstruct(self, data: bytes, media_type: str) -> MediaFile:
        """An image file to the PNG of what is left of it, or a video file to a video of this media type."""
        if is_video(data):
            video: MediaFile = await self._run_on_video(self._engine.video.reconstruct, data, media_type)
            return video
        original = await asyncio.to_thread(self._engine.prepare, data)
        reconstructed = await self._decode(await self._encode(original))
        mse = float(np.square(original.astype(np.float32) - reconstructed).mean())
        return self._png_file(reconstructed, float(10 * np.log10(255**2 / max(mse, 255**2 * 1e-10))))

    def _png_file(self, pixels_CHW: np.ndarray, psnr: float | None = None) -> MediaFile:
        return MediaFile(png_from_pixels(pixels_CHW), "image/png", pixels_CHW[0].size, psnr=psnr)

    async def _run_on_video(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the engine in a thread for clips, which asks the computing thread for each few frames."""
        loop = asyncio.get_running_loop()
        with deadline_after(self._timeout_s) as deadline:
            call = partial(function, *arguments, self._model_thread.run_blocking, deadline)
            return await loop.run_in_executor(self._video_threads, call)


class CodecReplica:
    """Compresses and decompresses images and clips of any size."""

    def __init__(self, url: str, settings: Settings) -> None:
        replica_config = settings.codec
        self._model_thread, self._timeout_s = _ModelThread(replica_config.threads), settings.limits.request_timeout_s
        self._engine: CodecEngine = self._model_thread.run_blocking(
            CodecEngine, url, replica_config.device, settings.limits
        )

    async def metadata(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.metadata()

    async def compress(self, data: bytes) -> MediaFile:
        """An image or video file to a .bsq file."""
        with deadline_after(self._timeout_s) as deadline:
            file: MediaFile = await self._model_thread(self._engine.compress, data, deadline)
            return file

    async def decompress(self, data: bytes, media_type: str) -> MediaFile:
        """A .bsq file to a PNG, or that of a clip to a video of this media type."""
        with deadline_after(self._timeout_s) as deadline:
            file: MediaFile = await self._model_thread(self._engine.decompress, data, media_type, deadline)
            return file

    async def measure(self, data: bytes) -> QualityReport:
        """Figures of an image file."""
        with deadline_after(self._timeout_s) as deadline:
            report: QualityReport = await self._model_thread(self._engine.measure, data, deadline)
            return report


class GeneratorReplica:
    """Draws images of classes, several requests in each forward pass."""

    def __init__(self, url: str, settings: Settings) -> None:
        replica_config = settings.generator
        self._model_thread = _ModelThread(replica_config.threads)
        arguments = url, replica_config.device, replica_config.max_batch_size, settings.limits.max_steps
        self._engine: GeneratorEngine = self._model_thread.run_blocking(GeneratorEngine, *arguments)
        self._batched_forward = self._model_thread.make_batcher(self._engine.forward, replica_config)
        # A request's own part of the work: drawing from the logits and packing the PNG.
        self._sampling_threads = ThreadPoolExecutor(
            settings.limits.max_ongoing_requests, "draw", lambda: set_num_threads(1)
        )

    async def metadata(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.metadata()

    async def generate(self, label: int, seed: int, sampling_overrides: dict[str, Any]) -> AsyncIterator[bytes]:
        """PNGs after each step."""
        self._engine.check_request(label, sampling_overrides)
        loop = asyncio.get_running_loop()

        def wait_for(awaitable: Any) -> Tensor:
            return asyncio.run_coroutine_threadsafe(awaitable, loop).result()

        async def forward(rows: tuple[Tensor, Tensor]) -> Tensor:
            logits: Tensor = await self._batched_forward(rows)
            return logits

        images = self._engine.generate_steps(
            label, seed, sampling_overrides,
            lambda tokens, classes: wait_for(forward((tokens, classes))),
            lambda bits: wait_for(self._model_thread(self._engine.decode, bits)),
        )  # fmt: skip
        # One step at a time: a client that reads slowly or goes away holds one picture, and nothing runs on.
        while (image := await loop.run_in_executor(self._sampling_threads, next, images, None)) is not None:
            yield image


def replica_class(role: str) -> type:
    """The class of replicas that play a role."""
    return {"tokenizer": TokenizerReplica, "codec": CodecReplica, "generator": GeneratorReplica}[role]
