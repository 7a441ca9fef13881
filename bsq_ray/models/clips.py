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

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def chunk_frames(section: config.TokenizerModel) -> int:
    """Frames of a chunk; the last one may be shorter."""
    return 1 if section.causal else section.frames


def clip_encoder(tokenizer: Tokenizer) -> Callable[[Tensor], Tokens]:
    """A function that is given the chunks (B, 3, T, H, W) of one clip in their order."""
    if chunk_frames(tokenizer.config) > 1:
        return tokenizer.encode
    return _one_by_one(tokenizer.encode_stream)


def clip_decoder(tokenizer: Tokenizer) -> Callable[[Tokens], Tensor]:
    """The inverse of `clip_encoder`."""
    if chunk_frames(tokenizer.config) > 1:
        return partial(_decode, tokenizer)
    return _one_by_one(tokenizer.decode_stream)


def _decode(tokenizer: Tokenizer, tokens: Tokens) -> Tensor:
    images = tokenizer.decode(tokens)
    return images if images.ndim == 5 else images.unsqueeze(2)


def _one_by_one(stream: Callable[[Iterable[_Given]], Iterator[_Made]]) -> Callable[[_Given], _Made]:
    """A function of one after the other, of a function of all."""
    waiting: list[_Given] = []
    made = stream(waiting.pop() for _ in count())

    def step(given: _Given) -> _Made:
        waiting.append(given)
        return next(made)

    return step
