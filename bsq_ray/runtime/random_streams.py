"""Random numbers by purpose: no two purposes share a stream, whatever the seeds and counters are.

numpy fills short seeds with zeros, so that seeds such as (seed, epoch) and (seed, epoch, 0, 0) give the same numbers.
Here the purpose is part of a hash, from which each stream is seeded.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import numpy as np


class RandomStream(StrEnum):
    """The purpose of a stream, and the words that seed it."""

    PACK_ORDER = "order of files in shards: seed"
    SHARD_ORDER = "order of shards: seed, epoch"
    MIXTURE_ORDER = "order of the data sets of a mixture: seed, block"
    BATCH_KIND = "kinds of the batches of images and clips: seed, block"
    CROP_SIZE = "crop sizes of batches: seed, block"
    BLOCK_ORDER = "order in a block: seed, epoch, lane, block"
    IMAGE_CROP = "crop of an image: seed, epoch, sample"
    CLIP_CROP = "start and crop of a clip: seed, epoch, sample"
    TOKENIZER_CROP = "crops that are tokenized: seed"
    KEPT_BITS = "kept bits of each sample of a batch: seed, step"
    BIT_NOISE = "flipped bits of a sample: seed, step, position in the batch"
    EVALUATION_BIT_NOISE = "flipped bits of a sample: key"
    TOKEN_MASK = "mask and class dropout: seed, step, key"
    GENERATED_IMAGE = "sampled tokens: seed, image"
    FREQUENCY_BASELINE = "rows of the per-position frequencies: seed, image"


def stream_seed(stream: RandomStream, *words: int | str) -> int:
    """Return a seed of 63 bits that depends on the purpose and on every word.

    Args:
        stream: purpose of the random numbers.
        words: integers of any size or texts, such as seed, epoch and sample.
    """
    digest = hashlib.blake2b(repr((stream.value, *words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def stream_rng(stream: RandomStream, *words: int | str) -> np.random.Generator:
    """Return the generator of a stream, see `stream_seed`."""
    return np.random.default_rng(stream_seed(stream, *words))
