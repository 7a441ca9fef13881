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

from bsq_ray.serving.batching import Batches
from bsq_ray.serving.deadline import awaited
from bsq_ray.serving.image_quality import Figures
from bsq_ray.serving.media.image_io import png
from bsq_ray.serving.media.video_io import is_clip
from bsq_ray.serving.payloads import File, PackedTokens
from bsq_ray.serving.replicas.engines import CodecEngine, GeneratorEngine, TokenizerEngine, use_threads
from bsq_ray.serving.service_config import Batching, Settings

# Videos that a tokenizer's replica works on at once, a few frames of each in turn.
_CLIPS = 4


class _Computing:
    """The thread of a replica in which its model computes."""

    def __init__(self, threads: int) -> None:
        self._thread = ThreadPoolExecutor(1, "model", lambda: use_threads(threads))

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def wait(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The same for a thread that waits."""
        return self._thread.submit(function, *arguments).result()

    def batched(self, function: Callable[[list[Any]], list[Any]], section: Batching) -> Batches:
        """`function` of many as an awaitable function of one."""
        sizes = Histogram(
            "serve_bsq_batch_size", "Requests computed together.", [1, 2, 4, 8, 16, 32, 64], ("function",)
        )

        async def together(items: list[Any]) -> list[Any]:
            sizes.observe(len(items), {"function": function.__name__})
            results: list[Any] = await self(function, items)
            return results

        return Batches(together, section.largest_batch, section.wait_ms / 1000)


class TokenizerReplica:
    """Encodes and decodes squares of the tokenizer's size, and clips of them."""

    def __init__(self, url: str, settings: Settings) -> None:
        section = settings.tokenizer
        self._compute, self._seconds = _Computing(section.threads), settings.limits.seconds
        arguments = url, section.device, section.largest_batch, settings.limits
        self._engine: TokenizerEngine = self._compute.wait(TokenizerEngine, *arguments)
        self._clips = ThreadPoolExecutor(_CLIPS, "clip", lambda: use_threads(1))
        self._encode = self._compute.batched(self._engine.encode, section)
        self._decode = self._compute.batched(self._engine.decode, section)

    async def facts(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.facts()

    async def encode(self, data: bytes) -> PackedTokens:
        """An image or video file to its tokens."""
        if is_clip(data):
            tokens: PackedTokens = await self._of_clip(self._engine.clips.encode, data)
            return tokens
        packed: np.ndarray = await self._encode(await asyncio.to_thread(self._engine.prepare, data))
        return PackedTokens([1, self._engine.side, self._engine.side], packed.tobytes())

    async def decode(self, tokens: PackedTokens, media_type: str) -> File:
        """Tokens to a PNG, or those of a clip to a video of this media type."""
        packed = self._engine.check_tokens(tokens.grid, tokens.packed)
        if tokens.rate is None:
            return self._picture(await self._decode(packed))
        video: File = await self._of_clip(self._engine.clips.decode, packed, Fraction(tokens.rate), media_type)
        return video

    async def reconstruct(self, data: bytes, media_type: str) -> File:
        """An image file to the PNG of what is left of it, or a video file to a video of this media type."""
        if is_clip(data):
            video: File = await self._of_clip(self._engine.clips.reconstruct, data, media_type)
            return video
        original = await asyncio.to_thread(self._engine.prepare, data)
        shown = await self._decode(await self._encode(original))
        error = float(np.square(original.astype(np.float32) - shown).mean())
        return self._picture(shown, float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10))))

    def _picture(self, pixels_CHW: np.ndarray, psnr: float | None = None) -> File:
        return File(png(pixels_CHW), "image/png", pixels_CHW[0].size, psnr=psnr)

    async def _of_clip(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the engine in a thread for clips, which asks the computing thread for each few frames."""
        loop = asyncio.get_running_loop()
        with awaited(self._seconds) as work:
            call = partial(function, *arguments, self._compute.wait, work)
            return await loop.run_in_executor(self._clips, call)


class CodecReplica:
    """Compresses and decompresses images and clips of any size."""

    def __init__(self, url: str, settings: Settings) -> None:
        section = settings.codec
        self._compute, self._seconds = _Computing(section.threads), settings.limits.seconds
        self._engine: CodecEngine = self._compute.wait(CodecEngine, url, section.device, settings.limits)

    async def facts(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.facts()

    async def compress(self, data: bytes) -> File:
        """An image or video file to a .bsq file."""
        with awaited(self._seconds) as work:
            file: File = await self._compute(self._engine.compress, data, work)
            return file

    async def decompress(self, data: bytes, media_type: str) -> File:
        """A .bsq file to a PNG, or that of a clip to a video of this media type."""
        with awaited(self._seconds) as work:
            file: File = await self._compute(self._engine.decompress, data, media_type, work)
            return file

    async def measure(self, data: bytes) -> Figures:
        """Figures of an image file."""
        with awaited(self._seconds) as work:
            figures: Figures = await self._compute(self._engine.measure, data, work)
            return figures


class GeneratorReplica:
    """Draws images of classes, several requests in each forward pass."""

    def __init__(self, url: str, settings: Settings) -> None:
        section = settings.generator
        self._compute = _Computing(section.threads)
        arguments = url, section.device, section.largest_batch, settings.limits.steps
        self._engine: GeneratorEngine = self._compute.wait(GeneratorEngine, *arguments)
        self._forward = self._compute.batched(self._engine.forward, section)
        # A request's own part of the work: drawing from the logits and packing the PNG.
        self._drawing = ThreadPoolExecutor(settings.limits.waiting, "draw", lambda: use_threads(1))

    async def facts(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.facts()

    async def draw(self, label: int, seed: int, changes: dict[str, Any]) -> AsyncIterator[bytes]:
        """PNGs after each step."""
        self._engine.check(label, changes)
        loop = asyncio.get_running_loop()

        def wait_for(awaitable: Any) -> Tensor:
            return asyncio.run_coroutine_threadsafe(awaitable, loop).result()

        async def forward(rows: tuple[Tensor, Tensor]) -> Tensor:
            logits: Tensor = await self._forward(rows)
            return logits

        pictures = self._engine.draw(
            label, seed, changes,
            lambda tokens, classes: wait_for(forward((tokens, classes))),
            lambda bits: wait_for(self._compute(self._engine.decode, bits)),
        )  # fmt: skip
        # One step at a time: a client that reads slowly or goes away holds one picture, and nothing runs on.
        while (picture := await loop.run_in_executor(self._drawing, next, pictures, None)) is not None:
            yield picture


def replica_class(role: str) -> type:
    """The class of replicas that play a role."""
    return {"tokenizer": TokenizerReplica, "codec": CodecReplica, "generator": GeneratorReplica}[role]
