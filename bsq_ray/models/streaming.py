"""Clips of any length through a causal tokenizer, chunk by chunk, in memory that does not grow.

    chunk ─▶ patches ─▶ encoder ─▶ bits    (Tokenizer.encode_stream)
    bits ─▶ codes ─▶ decoder ─▶ pixels     (Tokenizer.decode_stream)
                        │
                      Window: keys and values of the frames before, in every block

Up to the T frames that the model was trained with, tokens and pixels are those of one pass over the whole clip. There
is no position embedding beyond T, so there the window moves on: its last `overlap` frames become frames 0 … overlap - 1
of a new one, whose keys and values are computed afresh, and the clip goes on behind them. With T = 4, overlap = 2:

    frames    0 1 2 3 4 5 6 7
    window 0  0 1 2 3             numbers: the position embedding that a frame gets
    window 1      0 1 2 3         frames 4, 5 are made here
    window 2          0 1 2 3     frames 6, 7 are made here

So each frame is made exactly as in one pass over the T frames of its window, at a position that the model was trained
at, and it sees at least `overlap` frames before it. Beyond T a frame costs T / (T - overlap) times as much.

Shape suffixes: B clips, N tokens of a chunk of frames, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bsq_ray.models.layers.transformer import VisionTransformer


class StreamingWindow:
    """A causal transformer over frames that come piece by piece.

    Args:
        transformer: its `frames` are the longest window.
        overlap: frames of a full window that the next one begins with; None takes half of them.

    Raises:
        ValueError: the transformer is not causal, or the overlap is not below its frames.
    """

    def __init__(self, transformer: VisionTransformer, overlap: int | None) -> None:
        frames = transformer.frames
        if not transformer.causal and frames > 1:
            raise ValueError(
                f"a model with model.causal=false looks at whole clips of up to {frames} frames and cannot stream; "
                "encode such clips one after the other, or use a causal model"
            )
        if overlap is not None and not 0 <= overlap < frames:
            raise ValueError(f"overlap {overlap} must be 0 or more and below the model's {frames} frames")
        self.transformer = transformer
        self.overlap = frames // 2 if overlap is None else overlap
        self.caches = transformer.new_caches()
        self._num_frames = 0
        self._recent_BND: Tensor | None = None

    def push(self, x_BND: Tensor) -> Tensor:
        """What the transformer makes of the next frames, any number of them; same shape out as in.

        Raises:
            ValueError: the number of clips is not that of the frames before.
        """
        tokens_per_frame = len(self.transformer.spatial_position)
        if self._recent_BND is not None and len(self._recent_BND) != len(x_BND):
            raise ValueError(f"this stream began with {len(self._recent_BND)} clips at once and now has {len(x_BND)}")
        parts = []
        while x_BND.shape[1]:
            if self._num_frames == self.transformer.frames:
                self._slide()
            capacity = (self.transformer.frames - self._num_frames) * tokens_per_frame
            part_BND, x_BND = x_BND[:, :capacity], x_BND[:, capacity:]
            parts.append(self.transformer(part_BND, self.caches))
            self._num_frames += part_BND.shape[1] // tokens_per_frame
            self._append(part_BND, self.overlap * tokens_per_frame)
        return torch.cat(parts, 1)

    def _slide(self) -> None:
        for cache in self.caches:
            cache.length = 0
        self._num_frames = self.overlap
        if self.overlap:
            self.transformer(self._recent_BND, self.caches)

    def _append(self, x_BND: Tensor, num_tokens: int) -> None:
        recent_BND = x_BND if self._recent_BND is None else torch.cat([self._recent_BND, x_BND], 1)
        # A copy, so that what is forgotten is freed.
        self._recent_BND = recent_BND[:, max(0, recent_BND.shape[1] - num_tokens) :].clone()
