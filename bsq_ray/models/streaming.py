"""Encode and decode clips of any length, chunk by chunk, in constant memory.

    chunk ─▶ patches ─▶ encoder ─▶ bits    (Tokenizer.encode_stream)
    bits ─▶ codes ─▶ decoder ─▶ pixels     (Tokenizer.decode_stream)
                        │
          StreamingWindow: KV cache of the earlier frames, in every block

Training clips have T frames. For clips of up to T frames, tokens and pixels equal those of one pass over the clip.
Training knows no positions beyond T, so longer clips use a sliding window. The last `overlap` frames of a window
become frames 0 … overlap - 1 of the next one; their keys and values are recomputed. With T = 4 and overlap = 2:

    frames    0 1 2 3 4 5 6 7
    window 0  0 1 2 3             numbers: the position of a frame
    window 1      0 1 2 3         computes frames 4, 5
    window 2          0 1 2 3     computes frames 6, 7

Each frame is computed as in one pass over the T frames of its window, at a position used in training. It attends to at
least `overlap` earlier frames. Beyond T a frame costs T / (T - overlap) times as much.

`clip_encoder` and `clip_decoder` support every kind of tokenizer. Causal models stream frame by frame. Image models
process each frame independently. Other models process chunks of `frames_per_chunk` frames.

Shape suffixes: B clips, T frames, H and W pixels, N tokens of a chunk, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from bsq_ray import config
from bsq_ray.models.layers.kv_cache import KeyValueCache
from bsq_ray.models.layers.transformer import VisionTransformer

if TYPE_CHECKING:
    from bsq_ray.models.tokenizer import Tokenizer, Tokens

_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")


class StreamingWindow:
    """A causal transformer over frames that arrive in chunks.

    Args:
        transformer: causal or single-frame transformer; its `frames` attribute is the window length.
        overlap: number of frames shared by consecutive windows; None stands for half a window.

    Raises:
        ValueError: the transformer is not causal, or the overlap is not less than the window length.
    """

    def __init__(self, transformer: VisionTransformer, overlap: int | None) -> None:
        frames = transformer.frames
        if not transformer.causal and frames > 1:
            raise ValueError(
                f"a model with model.causal=false needs whole clips of up to {frames} frames and cannot stream; "
                "encode each clip in one pass, or use a causal model"
            )
        if overlap is not None and not 0 <= overlap < frames:
            raise ValueError(f"overlap {overlap} must be 0 or more and less than the model's {frames} frames")
        self.transformer = transformer
        self.overlap = frames // 2 if overlap is None else overlap
        self.caches: list[KeyValueCache] = []
        self._grid: tuple[int, int] | None = None
        self._num_frames = 0
        self._recent_BND: Tensor | None = None

    def push(self, x_BND: Tensor, grid: tuple[int, int]) -> Tensor:
        """Run the transformer on one or more further frames; return features of the same shape.

        Args:
            grid: rows and columns of tokens of a frame.

        Raises:
            ValueError: the batch size or the grid differs from that of earlier calls.
        """
        tokens_per_frame = grid[0] * grid[1]
        if self._grid is None:
            self._grid, self.caches = grid, self.transformer.new_caches(tokens_per_frame)
        if self._grid != grid:
            raise ValueError(
                f"the stream started with frames of {self._grid[1]} x {self._grid[0]} tokens but got {grid[1]} x "
                f"{grid[0]}; start another stream for frames of another size"
            )
        if self._recent_BND is not None and len(self._recent_BND) != len(x_BND):
            raise ValueError(f"the stream started with batch size {len(self._recent_BND)} but got {len(x_BND)}")
        parts = []
        while x_BND.shape[1]:
            if self._num_frames == self.transformer.frames:
                self._slide(grid)
            capacity = (self.transformer.frames - self._num_frames) * tokens_per_frame
            part_BND, x_BND = x_BND[:, :capacity], x_BND[:, capacity:]
            parts.append(self.transformer(part_BND, self.caches, grid))
            self._num_frames += part_BND.shape[1] // tokens_per_frame
            self._keep_recent(part_BND, self.overlap * tokens_per_frame)
        return torch.cat(parts, 1)

    def _slide(self, grid: tuple[int, int]) -> None:
        for cache in self.caches:
            cache.length = 0
        self._num_frames = self.overlap
        if self.overlap:
            self.transformer(self._recent_BND, self.caches, grid)

    def _keep_recent(self, x_BND: Tensor, num_tokens: int) -> None:
        recent_BND = x_BND if self._recent_BND is None else torch.cat([self._recent_BND, x_BND], 1)
        # A copy frees the memory of the older frames; a view would keep it.
        self._recent_BND = recent_BND[:, max(0, recent_BND.shape[1] - num_tokens) :].clone()


def frames_per_chunk(model_config: config.TokenizerModelConfig) -> int:
    """Return the number of frames per chunk; the last chunk of a clip may be shorter."""
    return 1 if model_config.causal else model_config.frames


def clip_encoder(tokenizer: Tokenizer) -> Callable[[Tensor], Tokens]:
    """Return a stateful function from chunks (B, 3, T, H, W) to tokens; pass it the chunks of one clip in order."""
    if frames_per_chunk(tokenizer.config) > 1:
        return tokenizer.encode
    return _as_step_function(tokenizer.encode_stream)


def clip_decoder(tokenizer: Tokenizer) -> Callable[[Tokens], Tensor]:
    """Return the inverse of `clip_encoder`: a function from tokens to chunks (B, 3, T, H, W)."""
    if frames_per_chunk(tokenizer.config) > 1:
        return partial(_decode_clip, tokenizer)
    return _as_step_function(tokenizer.decode_stream)


def _decode_clip(tokenizer: Tokenizer, tokens: Tokens) -> Tensor:
    images_BCHW_or_BCTHW = tokenizer.decode(tokens)
    return images_BCHW_or_BCTHW if images_BCHW_or_BCTHW.ndim == 5 else images_BCHW_or_BCTHW.unsqueeze(2)


def _as_step_function(stream: Callable[[Iterable[_InputT]], Iterator[_OutputT]]) -> Callable[[_InputT], _OutputT]:
    """Convert a generator function over an iterable to a function that maps one item per call."""
    pending: list[_InputT] = []
    outputs = stream(pending.pop() for _ in count())

    def step(item: _InputT) -> _OutputT:
        pending.append(item)
        return next(outputs)

    return step
