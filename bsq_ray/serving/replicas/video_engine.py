"""Videos of any length through the tokenizer, a few frames at a time, between the batches of other requests.

    video file ─▶ frames ─▶ chunks ─encode─▶ tokens ─decode─▶ frames ─▶ video file
    decoding subprocess             model thread               thread of the request

Memory does not grow with the length of the video, except for the response. Tokens and pixels equal those of
`bsq-ray reconstruct`: squares of the model's size in a stream, or with local attention whole frames, as many at a time
as the model has. The frames of a large chunk are computed in the thread of the codec.

Shape suffixes: T frames of a chunk, t frames, r rows and c columns of tokens, L bits of a token, H and W pixels.
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

from bsq_ray.codec.whole_frames import WholeFrameCoder, check_frame_sizes
from bsq_ray.data.transforms import eval_transform, to_float, to_uint8
from bsq_ray.media.color import ColorDescription
from bsq_ray.metrics.psnr import psnr
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.streaming import clip_decoder, clip_encoder, frames_per_chunk
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.serving.deadline import Deadline
from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.media.video_io import check_total_pixels, encode_video_file, read_uploaded_video
from bsq_ray.serving.payloads import MediaFile, PackedTokens
from bsq_ray.serving.replicas.whole_images import count_patch_pixels
from bsq_ray.serving.service_config import Limits

# Calls a function in a model thread and returns its result; the first argument is the number of pixels to compute.
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
        self._image_size, self._patch_size = model_config.image_size, model_config.patch_size
        self._whole_frames = WholeFrameCoder(tokenizer) if model_config.has_local_attention else None
        self._chunk_frames = model_config.frames if self._whole_frames else frames_per_chunk(model_config)

    def encode(self, data: bytes, *, run_in_model_thread: RunInModelThread, deadline: Deadline) -> PackedTokens:
        """Return the tokens of a video file.

        Raises:
            ApiError: see `read_uploaded_video`; 503 the deadline passed.
        """
        video, encode = read_uploaded_video(data, self._limits, self._count_pixels), self._start_encoder(deadline)
        grids, packed = [], []
        for chunk in self._iter_chunks(self._prepare(video.frames), deadline):
            bits_trcL: Tensor = run_in_model_thread(_num_pixels(chunk), encode, chunk)
            grids.append(list(bits_trcL.shape[:3]))
            packed.append(pack_bits(bits_trcL.flatten(0, 2)).numpy().tobytes())
        return PackedTokens(
            [sum(frames for frames, _, _ in grids), *grids[0][1:]], b"".join(packed), str(video.frame_rate)
        )

    def decode(
        self,
        tokens: PackedTokens,
        rate: Fraction,
        media_type: str,
        *,
        run_in_model_thread: RunInModelThread,
        deadline: Deadline,
    ) -> MediaFile:
        """Return the video of the tokens of a request that `check_tokens` accepts.

        Args:
            rate: frames per second.

        Raises:
            ApiError: 503 the deadline passed.
        """
        num_frames, rows, columns = tokens.grid
        size_hw = rows * self._patch_size, columns * self._patch_size
        frame_pixels = size_hw[0] * size_hw[1]
        packed_trcb = np.frombuffer(tokens.packed, np.uint8).reshape(num_frames, rows, columns, -1)
        decode = self._start_decoder(deadline)

        def frames() -> Iterator[np.ndarray]:
            for chunk in self._iter_chunks(packed_trcb, deadline):
                packed = torch.from_numpy(np.stack(chunk).reshape(-1, packed_trcb.shape[3]))
                bits_trcL = unpack_bits(packed, self._tokenizer.quantizer.bits).unflatten(0, (-1, rows, columns))
                yield from run_in_model_thread(len(chunk) * frame_pixels, decode, bits_trcL, size_hw)

        file, num_frames = encode_video_file(frames(), media_type, rate=rate, color=_DEFAULT_COLOR)
        return MediaFile(file, media_type, num_frames * frame_pixels, num_frames)

    def check_tokens(self, tokens: PackedTokens) -> None:
        """Check the tokens of a video, without PyTorch.

        Raises:
            ApiError: 422 the tokens do not match this model, 413 the video has too many pixels.
        """
        num_frames, rows, columns = tokens.grid
        side, bytes_per_token = self._image_size // self._patch_size, -(-self._tokenizer.quantizer.bits // 8)
        is_valid_size = min(rows, columns) >= 1 if self._whole_frames else rows == columns == side
        is_valid_length = len(tokens.packed) == num_frames * rows * columns * bytes_per_token
        if num_frames < 1 or not is_valid_size or not is_valid_length:
            sides = "rows, columns" if self._whole_frames else f"{side}, {side}"
            raise ApiError(
                422,
                f"the tokens do not match this model; it expects grid [frames, {sides}] and for each token "
                f"{bytes_per_token} bytes",
            )
        frame_pixels = self._image_size**2
        if self._whole_frames:
            frame_pixels = count_patch_pixels(rows, columns, self._patch_size, self._limits.max_pixels)
        check_total_pixels(num_frames, frame_pixels, self._limits)

    def reconstruct(
        self, data: bytes, media_type: str, *, run_in_model_thread: RunInModelThread, deadline: Deadline
    ) -> MediaFile:
        """Encode and decode a video file; return the video and its PSNR.

        Raises:
            ApiError: as `encode`.
        """
        video = read_uploaded_video(data, self._limits, self._count_pixels)
        encode, decode = self._start_encoder(deadline), self._start_decoder(deadline)
        originals: deque[np.ndarray] = deque()
        psnr_values: list[float] = []
        num_pixels = num_bits = 0

        def encode_and_decode(chunk: list[np.ndarray]) -> list[np.ndarray]:
            nonlocal num_bits
            _, height, width = chunk[0].shape
            bits_trcL = encode(chunk)
            num_bits += bits_trcL.numel()
            return decode(bits_trcL, (height, width))

        def frames() -> Iterator[np.ndarray]:
            nonlocal num_pixels
            for chunk in self._iter_chunks(self._prepare(video.frames), deadline):
                originals.extend(chunk)
                for frame in run_in_model_thread(_num_pixels(chunk), encode_and_decode, chunk):
                    decoded_CHW = frame.transpose(2, 0, 1)
                    num_pixels += decoded_CHW[0].size
                    psnr_values.append(float(psnr(_to_tensor(originals.popleft()), _to_tensor(decoded_CHW))))
                    yield frame

        file, num_frames = encode_video_file(frames(), media_type, rate=video.frame_rate, color=video.color)
        return MediaFile(file, media_type, num_pixels, num_frames, float(np.mean(psnr_values)), num_bits)

    def _count_pixels(self, height: int, width: int) -> int:
        """Return the pixels to compute for a frame: those of its whole patches, or at least the model's square."""
        if not self._whole_frames:
            return max(height * width, self._image_size**2)
        rows, columns = (-(-side // self._patch_size) for side in (height, width))
        return count_patch_pixels(rows, columns, self._patch_size, self._limits.max_pixels)

    def _prepare(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield frames (3, H, W), resized and cropped to the model's square unless they keep their size."""
        if not self._whole_frames:
            for pixels_HWC in frames:
                yield eval_transform(Image.fromarray(pixels_HWC), self._image_size, self._resize_filter)
            return
        try:
            for pixels_HWC in check_frame_sizes(frames):
                yield pixels_HWC.transpose(2, 0, 1)
        except ValueError as error:
            raise ApiError(422, str(error)) from None

    def _iter_chunks(self, frames: Iterable[np.ndarray], deadline: Deadline) -> Iterator[list[np.ndarray]]:
        remaining = iter(frames)
        while chunk := list(islice(remaining, self._chunk_frames)):
            deadline.check()
            yield chunk

    def _start_encoder(self, deadline: Deadline) -> Callable[[list[np.ndarray]], Tensor]:
        """Return a stateful function from frames, each (3, H, W), to bits (t, r, c, L) on the CPU."""
        whole_frames = self._whole_frames
        if whole_frames:
            return lambda chunk: whole_frames.encode(torch.from_numpy(np.stack(chunk, 1)), deadline.check)
        encoder = clip_encoder(self._tokenizer)

        def encode(chunk: list[np.ndarray]) -> Tensor:
            tokens = encoder(to_float(torch.from_numpy(np.stack(chunk, 1))[None]).to(self._device))
            return tokens.bits_BNL[0].cpu().unflatten(0, tokens.grid)

        return encode

    def _start_decoder(self, deadline: Deadline) -> Callable[[Tensor, tuple[int, int]], list[np.ndarray]]:
        """Return a stateful function from bits (t, r, c, L) and height and width to frames, each (H, W, 3)."""
        whole_frames = self._whole_frames
        decoder = clip_decoder(self._tokenizer)

        def decode(bits_trcL: Tensor, size_hw: tuple[int, int]) -> list[np.ndarray]:
            if whole_frames:
                pixels_3THW = whole_frames.decode(bits_trcL, size_hw, deadline.check)
            else:
                grid = bits_trcL.shape[0], bits_trcL.shape[1], bits_trcL.shape[2]
                [pixels_3THW] = to_uint8(decoder(Tokens(bits_trcL.flatten(0, 2)[None].to(self._device), grid)))
            return list(pixels_3THW.permute(1, 2, 3, 0).contiguous().cpu().numpy())

        return decode


def _num_pixels(chunk: list[np.ndarray]) -> int:
    return len(chunk) * chunk[0][0].size


def _to_tensor(pixels_CHW: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(pixels_CHW))[None]
