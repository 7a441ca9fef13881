"""Replicas that hold a model: what Ray Serve starts, scales and replaces.

    request ─▶ threads that read files ─▶ batch ─▶ the one thread that computes ─▶ answer

Everything PyTorch computes runs in one thread of a replica, so its cores are used by one computation at a time.
Batches form while the one before is computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
from ray import serve
from torch import Tensor

from bsq_ray.serving.engines import CodecEngine, GeneratorEngine, TokenizerEngine, Work, use_threads
from bsq_ray.serving.figures import Figures
from bsq_ray.serving.images import png
from bsq_ray.serving.settings import Batching, Settings


class _Computing:
    """The thread of a replica in which its model computes."""

    def __init__(self, threads: int) -> None:
        self._thread = ThreadPoolExecutor(1, "model", lambda: use_threads(threads))

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def build(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """The same for a constructor, which is not awaited."""
        return self._thread.submit(make, *arguments).result()

    def batched(self, function: Callable[[list[Any]], list[Any]], section: Batching) -> Callable[[Any], Any]:
        """`function` of many as an awaitable function of one."""

        async def together(items: list[Any]) -> list[Any]:
            results: list[Any] = await self(function, items)
            return results

        together.__name__ = function.__name__
        batch = serve.batch(max_batch_size=section.largest_batch, batch_wait_timeout_s=section.wait_ms / 1000)
        joined: Callable[[Any], Any] = batch(together)
        return joined


class TokenizerReplica:
    """Encodes and decodes squares of the tokenizer's size."""

    def __init__(self, url: str, settings: Settings) -> None:
        section = settings.tokenizer
        self._compute = _Computing(section.threads)
        arguments = url, section.device, section.largest_batch, settings.limits.pixels
        self._engine: TokenizerEngine = self._compute.build(TokenizerEngine, *arguments)
        self._encode = self._compute.batched(self._engine.encode, section)
        self._decode = self._compute.batched(self._engine.decode, section)

    async def facts(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.facts()

    async def encode(self, data: bytes) -> bytes:
        """An image file to its packed tokens."""
        packed: np.ndarray = await self._encode(await asyncio.to_thread(self._engine.prepare, data))
        return packed.tobytes()

    async def decode(self, grid: list[int], packed: bytes) -> bytes:
        """Packed tokens to a PNG."""
        return png(await self._decode(self._engine.check_tokens(grid, packed)))

    async def reconstruct(self, data: bytes) -> tuple[bytes, float]:
        """An image file to the PNG of what is left of it, and its PSNR in dB."""
        original = await asyncio.to_thread(self._engine.prepare, data)
        shown = await self._decode(await self._encode(original))
        error = float(np.square(original.astype(np.float32) - shown).mean())
        return png(shown), float(10 * np.log10(255**2 / max(error, 255**2 * 1e-10)))


class CodecReplica:
    """Compresses and decompresses images of any size."""

    def __init__(self, url: str, settings: Settings) -> None:
        section, limits = settings.codec, settings.limits
        self._compute, self._seconds = _Computing(section.threads), limits.seconds
        arguments = url, section.device, limits.pixels, limits.seconds
        self._engine: CodecEngine = self._compute.build(CodecEngine, *arguments)

    async def facts(self) -> dict[str, Any]:
        """See the engine."""
        return self._engine.facts()

    async def compress(self, data: bytes) -> tuple[bytes, tuple[int, int]]:
        """An image file to a .bsq file, and the image's size."""
        return await self._while_awaited(self._engine.compress, data)

    async def decompress(self, data: bytes) -> tuple[bytes, tuple[int, int]]:
        """A .bsq file to a PNG, and the image's size."""
        return await self._while_awaited(self._engine.decompress, data)

    async def measure(self, data: bytes) -> Figures:
        """Figures of an image file."""
        return await self._while_awaited(self._engine.measure, data)

    async def _while_awaited(self, function: Callable[..., Any], data: bytes) -> Any:
        """Calls the engine, which stops when the one who asked has gone."""
        work = Work(time.monotonic() + self._seconds, Event())
        try:
            return await self._compute(function, data, work)
        finally:
            work.abandoned.set()


class GeneratorReplica:
    """Draws images of classes, several requests in each forward pass."""

    def __init__(self, url: str, settings: Settings) -> None:
        section = settings.generator
        self._compute = _Computing(section.threads)
        arguments = url, section.device, section.largest_batch, settings.limits.steps
        self._engine: GeneratorEngine = self._compute.build(GeneratorEngine, *arguments)
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
