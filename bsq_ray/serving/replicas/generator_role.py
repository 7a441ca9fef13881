"""The generator of a replica: images of classes, with the forward passes of several requests in one batch.

    class ─▶ sampling thread of the request ─(tokens, class weights)─▶ batch ─▶ model thread
               ▲    └─ decode, PNG ─▶ image of this step                          │
               └──────────────────────── logits ──────────────────────────────────┘

Shape suffixes: B batch, N tokens, S sub-tokens, L bits of a token, C class weights, V values of a sub-token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from bsq_ray import config
from bsq_ray.data.transforms import to_uint8
from bsq_ray.models.generator import Generator
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.image_io import png_from_pixels, webp_from_frames
from bsq_ray.serving.replicas.model_metadata import generator_fields, tokenizer_fields
from bsq_ray.serving.replicas.model_thread import set_num_threads
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime

Predict = Callable[[Tensor, Tensor], Tensor]
Decode = Callable[[Tensor], Tensor]


class GeneratorEngine:
    """Samples images of classes; forward passes of several requests can share a batch."""

    def __init__(self, url: str, runtime: ReplicaRuntime) -> None:
        self.generator = Generator.from_pretrained(url, device=runtime.device)
        self._device, self._max_steps = runtime.device, runtime.limits.max_steps
        model, max_batch_size = self.generator.model, runtime.batching.max_batch_size
        shape = max_batch_size, model.config.num_tokens, model.config.num_sub_tokens
        tokens_BNS = torch.randint(0, model.mask_token + 1, shape)
        classes_BC = model.class_weights(torch.full((max_batch_size,), model.null_class))
        architecture = model.config.model_dump_json()
        self._batched_forward = runtime.make_runner(self._forward, architecture, tokens_BNS, classes_BC)

    def check_request(self, label: int, sampling_overrides: dict[str, Any]) -> None:
        """Reject a request that `generate_steps` could not carry out.

        Raises:
            ApiError: 422 an unknown class or an invalid value.
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
            raise ApiError(422, f"steps: at most {self._max_steps} are allowed")

    def generate_steps(
        self, label: int, seed: int, sampling_overrides: dict[str, Any], *, predict: Predict, decode: Decode
    ) -> Iterator[bytes]:
        """Yield a PNG, or an animated WebP of a video, after each step; masked parts are gray, the last is final.

        Args:
            predict: `forward` of one request.
            decode: bits (B, N, L) to images, as `decode`.
        """
        for images in self.generator.iter_steps([label], seed, predict, decode, **sampling_overrides):
            pixels = to_uint8(images)[0].cpu().numpy()
            yield png_from_pixels(pixels) if pixels.ndim == 3 else webp_from_frames(pixels)

    def forward(self, requests: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return logits (B, N, S, V) per request for its sub-tokens (B, N, S) and class weights (B, C)."""
        tokens_BNS = torch.cat([tokens for tokens, _ in requests])
        classes_BC = torch.cat([classes for _, classes in requests])
        logits_BNSV = self._batched_forward(tokens_BNS, classes_BC)
        return list(logits_BNSV.split([len(tokens) for tokens, _ in requests]))

    def decode(self, bits_BNL: Tensor) -> Tensor:
        """Return images (B, 3, H, W) of tokens."""
        return self.generator.decode(bits_BNL)

    @torch.no_grad()
    def _forward(self, tokens_BNS: Tensor, classes_BC: Tensor) -> Tensor:
        logits: Tensor = self.generator.model(tokens_BNS.to(self._device), classes_BC.to(self._device))
        return logits


class GeneratorRole:
    """Generates images of classes."""

    def __init__(self, url: str, runtime: ReplicaRuntime) -> None:
        self._model_thread, limits = runtime.batch_thread, runtime.limits
        self._engine: GeneratorEngine = self._model_thread.run_blocking(GeneratorEngine, url, runtime)
        self._batched_forward = self._model_thread.make_batcher(self._engine.forward, runtime.batching)
        # Each request samples from its logits and encodes its PNG in a thread of its own.
        self._sampling_threads = ThreadPoolExecutor(limits.max_ongoing_requests, "sample", lambda: set_num_threads(1))

    async def metadata(self) -> dict[str, Any]:
        """Return the fields of this model in `GET /v1/models`."""
        generator = self._engine.generator
        tokenizer = tokenizer_fields(generator.tokenizer.config, generator.tokenizer.model_id)
        return generator_fields(generator.model.config, generator.sampling, generator.model.model_id, tokenizer)

    async def generate(self, label: int, seed: int, sampling_overrides: dict[str, Any]) -> AsyncIterator[bytes]:
        """Yield an image file after each step."""
        self._engine.check_request(label, sampling_overrides)
        loop = asyncio.get_running_loop()

        def wait_for(awaitable: Any) -> Tensor:
            return asyncio.run_coroutine_threadsafe(awaitable, loop).result()

        async def forward(rows: tuple[Tensor, Tensor]) -> Tensor:
            logits: Tensor = await self._batched_forward(rows)
            return logits

        images = self._engine.generate_steps(
            label,
            seed,
            sampling_overrides,
            predict=lambda tokens, classes: wait_for(forward((tokens, classes))),
            decode=lambda bits: wait_for(self._model_thread(self._engine.decode, bits)),
        )
        # One step at a time: a slow client holds one image, and after a disconnect nothing more is computed.
        while (image := await loop.run_in_executor(self._sampling_threads, next, images, None)) is not None:
            yield image
