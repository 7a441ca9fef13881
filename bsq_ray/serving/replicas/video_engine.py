"""Videos of any length through the tokenizer, a few frames at a time, between the batches of other requests.

    video file ─▶ frames ─▶ chunks ─encode─▶ tokens ─decode─▶ frames ─▶ video file
    decoding subprocess             model thread               thread of the request

Memory does not grow with the length of the video, except for the response. Tokens and pixels equal those of
`bsq-ray reconstruct`.

Shape suffixes: T frames of a chunk, N tokens, b bytes of a packed token, H and W pixels.
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
from bsq_ray.media.color import ColorDescription
from bsq_ray.metrics.psnr import psnr
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.streaming import clip_decoder, clip_encoder, frames_per_chunk
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.serving.deadline import Deadline
from bsq_ray.serving.media.video_io import check_total_pixels, encode_video_file, read_uploaded_video
from bsq_ray.serving.payloads import MediaFile, PackedTokens
from bsq_ray.serving.service_config import Limits

# Calls a function in the model thread and returns its result.
RunInModelThread = Callable[..., Any]
# BT.709, as in most videos: tokens do not contain the color space of their source.
_DEFAULT_COLOR = ColorDescription(1, 1, 1, 0)


class VideoEngine:
    """Converts videos to tokens and back.

    Args:
        resize_filter: interpolation of the evaluation.
        limits: limits of requests.
    """

    def __init__(self, tokenizer: Tokenizer, resize_filter: Any, *, limits: Limits, device: str) -> None:
        model_config = tokenizer.config
        self._tokenizer, self._resize_filter, self._limits, self._device = tokenizer, resize_filter, limits, device
        self._image_size, self._grid_size = model_config.image_size, model_config.grid_size
        self._chunk_frames = frames_per_chunk(model_config)

    def encode(self, data: bytes, *, run_in_model_thread: RunInModelThread, deadline: Deadline) -> PackedTokens:
        """Return the tokens of a video file.

        Raises:
            ApiError: see `read_uploaded_video`; 503 the deadline passed.
        """
        video, encoder = read_uploaded_video(data, self._limits, self._image_size**2), clip_encoder(self._tokenizer)
        packed = [
            run_in_model_thread(self._encode, encoder, chunk)
            for chunk in self._iter_chunks(map(self._prepare, video.frames), deadline)
        ]
        num_frames = sum(len(part) for part in packed) // self._grid_size**2
        return PackedTokens(
            [num_frames, self._grid_size, self._grid_size],
            b"".join(part.tobytes() for part in packed),
            str(video.frame_rate),
        )

    def decode(
        self,
        packed: np.ndarray,
        rate: Fraction,
        media_type: str,
        *,
        run_in_model_thread: RunInModelThread,
        deadline: Deadline,
    ) -> MediaFile:
        """Return the video of packed tokens (T * N, b).

        Args:
            rate: frames per second.

        Raises:
            ApiError: 413 the video would be too long, 503 the deadline passed.
        """
        frames_TNb = packed.reshape(-1, self._grid_size**2, packed.shape[1])
        check_total_pixels(len(frames_TNb), self._image_size**2, self._limits)
        decoder = clip_decoder(self._tokenizer)

        def frames() -> Iterator[np.ndarray]:
            for chunk in self._iter_chunks(frames_TNb, deadline):
                yield from run_in_model_thread(self._decode, decoder, np.concatenate(chunk))

        file, num_frames = encode_video_file(frames(), media_type, rate=rate, color=_DEFAULT_COLOR)
        return MediaFile(file, media_type, num_frames * self._image_size**2, num_frames)

    def reconstruct(
        self, data: bytes, media_type: str, *, run_in_model_thread: RunInModelThread, deadline: Deadline
    ) -> MediaFile:
        """Encode and decode a video file; return the video and its PSNR.

        Raises:
            ApiError: as `encode`.
        """
        video = read_uploaded_video(data, self._limits, self._image_size**2)
        encoder, decoder = clip_encoder(self._tokenizer), clip_decoder(self._tokenizer)
        originals: deque[np.ndarray] = deque()
        psnr_values: list[float] = []

        def encode_and_decode(chunk: list[np.ndarray]) -> list[np.ndarray]:
            return self._decode(decoder, self._encode(encoder, chunk))

        def frames() -> Iterator[np.ndarray]:
            for chunk in self._iter_chunks(map(self._prepare, video.frames), deadline):
                originals.extend(chunk)
                for frame in run_in_model_thread(encode_and_decode, chunk):
                    decoded_CHW = frame.transpose(2, 0, 1)
                    psnr_values.append(float(psnr(_to_tensor(originals.popleft()), _to_tensor(decoded_CHW))))
                    yield frame

        file, num_frames = encode_video_file(frames(), media_type, rate=video.frame_rate, color=video.color)
        return MediaFile(file, media_type, num_frames * self._image_size**2, num_frames, float(np.mean(psnr_values)))

    def _prepare(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """Resize and crop a frame to the model's square, (3, H, W)."""
        return eval_transform(Image.fromarray(pixels_HWC), self._image_size, self._resize_filter)

    def _iter_chunks(self, frames: Iterable[np.ndarray], deadline: Deadline) -> Iterator[list[np.ndarray]]:
        remaining = iter(frames)
        while chunk := list(islice(remaining, self._chunk_frames)):
            deadline.check()
            yield chunk

    def _encode(self, encoder: Callable[[Tensor], Tokens], chunk: list[np.ndarray]) -> np.ndarray:
        """Convert frames, each (3, H, W), to packed tokens (T * N, b)."""
        clip_13THW = to_float(torch.from_numpy(np.stack(chunk, 1))[None]).to(self._device)
        packed: np.ndarray = pack_bits(encoder(clip_13THW).bits_BNL)[0].cpu().numpy()
        return packed

    def _decode(self, decoder: Callable[[Tokens], Tensor], packed: np.ndarray) -> list[np.ndarray]:
        """Convert packed tokens (T * N, b) to frames, each (H, W, 3)."""
        bits_1NL = unpack_bits(torch.from_numpy(packed)[None], self._tokenizer.quantizer.bits).to(self._device)
        grid = (len(packed) // self._grid_size**2, self._grid_size, self._grid_size)
        pixels_3THW = to_uint8(decoder(Tokens(bits_1NL, grid))[0])
        return list(pixels_3THW.permute(1, 2, 3, 0).contiguous().cpu().numpy())


def _to_tensor(pixels_CHW: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(pixels_CHW))[None]
