"""Clips of any length through the tokenizer, a few frames at a time, between the batches of other requests.

    video file ─▶ frames ─▶ chunks ─encode─▶ tokens ─decode─▶ frames ─▶ video file
    a process of the request        the thread that computes   a thread of the request

Nothing but the answer grows with the clip. The tokens and pixels are those of `bsq-ray reconstruct`.

Shape suffixes: T frames of a chunk, N tokens, H and W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.media.color import Color
from bsq_ray.metrics.psnr import psnr
from bsq_ray.models.clips import clip_decoder, clip_encoder, frames_per_chunk
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.serving.deadline import Work
from bsq_ray.serving.media.video_io import check_length, read_clip, written
from bsq_ray.serving.payloads import File, PackedTokens
from bsq_ray.serving.service_config import Limits

# Calls a function where the model computes.
Compute = Callable[..., Any]
# BT.709 as in most videos: tokens say nothing of their source's colours.
_COLOUR = Color(1, 1, 1, 0)


class ClipEngine:
    """Clips to tokens and back.

    Args:
        resize_filter: of the evaluation.
        limits: of bodies that strangers send.
    """

    def __init__(self, tokenizer: Tokenizer, resize_filter: Any, limits: Limits, device: str) -> None:
        section = tokenizer.config
        self._tokenizer, self._filter, self._limits, self._device = tokenizer, resize_filter, limits, device
        self._size, self._side = section.image_size, section.image_size // section.patch_size
        self._chunk = frames_per_chunk(section)

    def encode(self, data: bytes, compute: Compute, work: Work) -> PackedTokens:
        """The tokens of a video file.

        Raises:
            Refused: see `read_clip`; 503 when its time is up.
        """
        video, step = read_clip(data, self._limits, self._size**2), clip_encoder(self._tokenizer)
        packed = [compute(self._encode, step, chunk) for chunk in self._chunks(map(self._prepared, video.frames), work)]
        frames = sum(len(part) for part in packed) // self._side**2
        return PackedTokens(
            [frames, self._side, self._side], b"".join(part.tobytes() for part in packed), str(video.frame_rate)
        )

    def decode(self, packed: np.ndarray, rate: Fraction, media_type: str, compute: Compute, work: Work) -> File:
        """The video of packed tokens (N, bytes).

        Raises:
            Refused: 413 it would be too long, 503 when its time is up.
        """
        frames_TNb = packed.reshape(-1, self._side**2, packed.shape[1])
        check_length(len(frames_TNb), self._size**2, self._limits)
        step = clip_decoder(self._tokenizer)

        def frames() -> Iterator[np.ndarray]:
            for chunk in self._chunks(frames_TNb, work):
                yield from compute(self._decode, step, np.concatenate(chunk))

        file, count = written(frames(), media_type, rate, _COLOUR)
        return File(file, media_type, count * self._size**2, count)

    def reconstruct(self, data: bytes, media_type: str, compute: Compute, work: Work) -> File:
        """What is left of a video file.

        Raises:
            Refused: as `encode`.
        """
        video = read_clip(data, self._limits, self._size**2)
        encode, decode = clip_encoder(self._tokenizer), clip_decoder(self._tokenizer)
        waiting: deque[np.ndarray] = deque()
        qualities: list[float] = []

        def there_and_back(chunk: list[np.ndarray]) -> list[np.ndarray]:
            return self._decode(decode, self._encode(encode, chunk))

        def frames() -> Iterator[np.ndarray]:
            for chunk in self._chunks(map(self._prepared, video.frames), work):
                waiting.extend(chunk)
                for frame in compute(there_and_back, chunk):
                    shown = frame.transpose(2, 0, 1)
                    pair = (to_float(torch.from_numpy(pixels))[None] for pixels in (waiting.popleft(), shown))
                    qualities.append(float(psnr(*pair)))
                    yield frame

        file, count = written(frames(), media_type, video.frame_rate, video.color)
        return File(file, media_type, count * self._size**2, count, float(np.mean(qualities)))

    def _prepared(self, pixels_HWC: np.ndarray) -> np.ndarray:
        return eval_transform(Image.fromarray(pixels_HWC), self._size, self._filter)

    def _chunks(self, parts: Iterable[np.ndarray], work: Work) -> Iterator[list[np.ndarray]]:
        following = iter(parts)
        while chunk := list(islice(following, self._chunk)):
            work.check()
            yield chunk

    def _encode(self, step: Callable[[Tensor], Tokens], chunk: list[np.ndarray]) -> np.ndarray:
        """Frames (3, H, W) to packed tokens (N, bytes)."""
        clip_13THW = to_float(torch.from_numpy(np.stack(chunk, 1))[None]).to(self._device)
        packed: np.ndarray = pack_bits(step(clip_13THW).bits_BNL)[0].cpu().numpy()
        return packed

    def _decode(self, step: Callable[[Tokens], Tensor], packed: np.ndarray) -> list[np.ndarray]:
        """Packed tokens to frames (H, W, 3)."""
        bits_1NL = unpack_bits(torch.from_numpy(packed)[None], self._tokenizer.quantizer.bits).to(self._device)
        grid = (len(packed) // self._side**2, self._side, self._side)
        pixels_3THW = to_uint8(step(Tokens(bits_1NL, grid))[0])
        return list(pixels_3THW.permute(1, 2, 3, 0).contiguous().cpu().numpy())
