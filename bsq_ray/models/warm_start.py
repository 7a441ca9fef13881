"""Weights that a tokenizer begins its training with, from the folder of a trained one.

A video model begins as its image model looking at each frame alike: what is new, the temporal position, is zero. So a
one-frame clip, and in a causal model the first frame of any clip, comes out exactly as from the image model.

Shape suffixes: S tokens of one frame, h and w its rows and columns, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bsq_ray import config, model_folder

_PARTS = ("encoder", "decoder")
# What may differ: the size of the images, how frames see each other, and what only training uses.
_FREE = {"image_size", "frames", "causal", "gradient_checkpointing"}


def initial_weights(model: config.TokenizerModel, url: str) -> dict[str, Tensor]:
    """Every weight of a new tokenizer, taken from a model folder.

    Spatial positions are interpolated (bicubic) when the image size differs; temporal ones are zero when the folder's
    model is one of images.

    Args:
        url: path, fsspec URL or hub id of an image tokenizer, or of a video tokenizer of as many frames.

    Raises:
        ValueError: there is no such folder, or its model does not fit; the message names what differs.
    """
    folder = model_folder.read_model_folder(url)
    given = config.expect(folder.config, config.TokenizerConfig, url).model
    different = [
        f"model.{key} is {was} there and {now} here"
        for key, was, now in _differences(given.model_dump(exclude=_FREE), model.model_dump(exclude=_FREE))
    ]
    if given.frames not in (1, model.frames):
        different.append(f"model.frames is {given.frames} there, where 1 or {model.frames} would do")
    if different:
        raise ValueError(f"{url} cannot initialise this model: {'; '.join(different)}")
    weights = dict(folder.weights)
    side = model.image_size // model.patch_size
    for part in _PARTS:
        spatial = f"{part}.transformer.spatial_position"
        weights[spatial] = resized_positions(weights[spatial], side)
        temporal = f"{part}.transformer.temporal_position"
        if model.frames > 1 and temporal not in weights:
            weights[temporal] = torch.zeros(model.frames, weights[spatial].shape[1])
    return weights


def resized_positions(position_SD: Tensor, side: int) -> Tensor:
    """Position embeddings of a square grid of `side` rows and columns, interpolated from those of another one."""
    old = round(len(position_SD) ** 0.5)
    if old == side:
        return position_SD
    position_1Dhw = position_SD.T.unflatten(1, (old, old))[None]
    resized_1Dhw = F.interpolate(position_1Dhw, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized_1Dhw[0].flatten(1).T.contiguous()


def _differences(was: object, now: object, path: str = "") -> list[tuple[str, object, object]]:
    """Dotted keys of nested sections that have different values, except what only the training loss uses."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted((was.keys() | now.keys()) - {"entropy", "commit_weight"})
        return [found for key in keys for found in _differences(was.get(key), now.get(key), f"{path}.{key}")]
    return [] if was == now else [(path[1:], was, now)]
