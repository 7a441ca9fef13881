"""Warm start: initial weights of a tokenizer and of its discriminator from trained ones.

An image model also initializes a video model.

The only new weights of a video model, its temporal position embeddings, are zero; with rotary positions there are none,
and the first frame is rotated as an image. So a one-frame clip, and in a causal model the first frame of any clip, is
reconstructed exactly as by the image model.

Shape suffixes: S tokens of one frame, h and w its rows and columns, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config, model_folder

_PARTS = ("encoder", "decoder")
# Keys that may differ: they change no weights, or their weights are resized or added.
_IGNORED_KEYS = {"image_size", "frames", "causal", "gradient_checkpointing"}


def initial_weights(model_config: config.TokenizerModelConfig, url: str) -> dict[str, Tensor]:
    """Return all weights of a new tokenizer, loaded from a model folder.

    Spatial position embeddings are interpolated (bicubic) if the image size differs; those that repeat are kept.
    Temporal ones, if there are any, are zero if the source is an image model.

    Args:
        url: path, fsspec URL or hub id of an image tokenizer, or of a video tokenizer with the same number of frames.

    Raises:
        ValueError: the folder does not exist, or its model does not fit; the message lists the differences.
    """
    folder = model_folder.load_model_folder(url)
    source_config = config.require_stage(folder.config, config.TokenizerConfig, url).model
    mismatches = [
        f"model.{key} is {source_value} there and {target_value} here"
        for key, source_value, target_value in _diff_configs(
            source_config.model_dump(exclude=_IGNORED_KEYS), model_config.model_dump(exclude=_IGNORED_KEYS)
        )
    ]
    if source_config.frames not in (1, model_config.frames):
        mismatches.append(f"model.frames is {source_config.frames} there, where 1 or {model_config.frames} would do")
    if mismatches:
        raise ValueError(f"{url} cannot initialize this model: {'; '.join(mismatches)}")
    weights = dict(folder.weights)
    side = model_config.position_rows
    for part in _PARTS:
        spatial = f"{part}.transformer.spatial_position"
        weights[spatial] = resize_positions(weights[spatial], side)
        temporal = f"{part}.transformer.temporal_position"
        if model_config.temporal_positions and temporal not in weights:
            weights[temporal] = torch.zeros(model_config.frames, weights[spatial].shape[1])
    return weights


def initial_discriminator(discriminator: nn.Module, url: str) -> tuple[dict[str, Tensor] | None, str]:
    """Return the weights of the discriminator that was trained with a tokenizer.

    Args:
        discriminator: new discriminator, which is not changed.
        url: model folder of the tokenizer.

    Returns:
        Weights by name, and an empty text; or None and the reason, if the folder has no discriminator, or one of
        another architecture.
    """
    weights = model_folder.load_discriminator_weights(url)
    if weights is None:
        return None, f"{url} contains no discriminator, so a new one is trained"
    expected = {name: value.shape for name, value in discriminator.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != expected:
        return None, f"the discriminator in {url} has another architecture, so a new one is trained"
    return weights, ""


def resize_positions(position_SD: Tensor, side: int) -> Tensor:
    """Interpolate the position embeddings (S, D) of a square grid to `side` rows and columns."""
    source_side = round(len(position_SD) ** 0.5)
    if source_side == side:
        return position_SD
    position_1Dhw = position_SD.T.unflatten(1, (source_side, source_side))[None]
    resized_1Dhw = F.interpolate(position_1Dhw, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized_1Dhw[0].flatten(1).T.contiguous()


def _diff_configs(source_value: object, target_value: object, path: str = "") -> list[tuple[str, object, object]]:
    """Return dotted key and both values of every difference; keys used only by the training loss are ignored."""
    if isinstance(source_value, dict) and isinstance(target_value, dict):
        keys = sorted((source_value.keys() | target_value.keys()) - {"entropy", "commitment_weight", "keep"})
        return [
            difference
            for key in keys
            for difference in _diff_configs(source_value.get(key), target_value.get(key), f"{path}.{key}")
        ]
    return [] if source_value == target_value else [(path[1:], source_value, target_value)]
