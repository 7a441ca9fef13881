"""Clips of any length through any tokenizer, chunk by chunk.

    frames ─▶ chunks ─encode─▶ tokens of chunks ─decode─▶ frames

A causal model streams one frame after the other (see `streaming`), a model of images takes each frame alone, and one
that looks at whole clips takes as many frames at once as it can.

Shape suffixes: B clips, T frames of a chunk, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import TypeVar

from torch import Tensor

from bsq_ray import config
from bsq_ray.models.tokenizer import Tokenizer, Tokens

_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")


def frames_per_chunk(model_config: config.TokenizerModelConfig) -> int:
    """Frames of a chunk; the last one may be shorter."""
    return 1 if model_config.causal else model_config.frames


def clip_encoder(tokenizer: Tokenizer) -> Callable[[Tensor], Tokens]:
    """A function that is given the chunks (B, 3, T, H, W) of one clip in their order."""
    if frames_per_chunk(tokenizer.config) > 1:
        return tokenizer.encode
    return _as_step_function(tokenizer.encode_stream)


def clip_decoder(tokenizer: Tokenizer) -> Callable[[Tokens], Tensor]:
    """The inverse of `clip_encoder`."""
    if frames_per_chunk(tokenizer.config) > 1:
        return partial(_decode_clip, tokenizer)
    return _as_step_function(tokenizer.decode_stream)


def _decode_clip(tokenizer: Tokenizer, tokens: Tokens) -> Tensor:
    images = tokenizer.decode(tokens)
    return images if images.ndim == 5 else images.unsqueeze(2)


def _as_step_function(stream: Callable[[Iterable[_InputT]], Iterator[_OutputT]]) -> Callable[[_InputT], _OutputT]:
    """A function of one after the other, of a function of all."""
    pending: list[_InputT] = []
    outputs = stream(pending.pop() for _ in count())

    def step(item: _InputT) -> _OutputT:
        pending.append(item)
        return next(outputs)

    return step
