"""Identifiers of models: SHA-256 of weights and configuration.

model_id    all weights and the `model` options: what a file or a service refers to
tokens_id   weights and options from images to tokens: equal for all decoders of the same tokens

Weights of 16 bits have the ids of the equal fp32 weights, so that an id does not depend on how weights are stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from bsq_ray import config

# Data types of weights that fp32 represents exactly.
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Parts of a tokenizer that turn images into tokens; a quantizer has weights if it has a codebook.
_TOKEN_PARTS = ("encoder.", "to_code.", "quantizer.")
# Options of quantizers that only training or decoding uses.
_OTHER_KEYS = {"entropy", "commitment_weight", "keep"}
# Options of positions other than the learned ones of a fixed grid.
_POSITION_KEYS = ("position", "attention_radius", "position_period")


@dataclass(frozen=True)
class KeptTokens:
    """Tokens that a training of the decoder keeps.

    Attributes:
        tokens_id: id of the tokens.
        model_ids: ids of the earlier models with these tokens, newest first.
    """

    tokens_id: str
    model_ids: tuple[str, ...]


def compute_model_id(config_text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all tensors and of the `model` options that affect the result.

    Args:
        config_text: configuration of the run as YAML.
        tensors: weights by name, on the CPU.
    """
    model: dict[str, Any] = dict(yaml.safe_load(config_text).get("model", {}))
    model.pop("gradient_checkpointing", None)
    # These options came later: models that do not use them keep their ids.
    if model.get("tokens_id") is None:
        model.pop("tokens_id", None)
    if model.get("position", "learned") == "learned":
        for key in _POSITION_KEYS:
            model.pop(key, None)
    if model.get("order") == "token":
        del model["order"]
    quantizer = model.get("quantizer")
    if isinstance(quantizer, dict) and not quantizer.get("keep"):
        model["quantizer"] = {key: value for key, value in quantizer.items() if key != "keep"}
    return _digest(model, tensors)


def compute_tokens_id(run_config: config.AnyConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the SHA-256 of a tokenizer's weights and options from images to tokens; None for other models.

    Args:
        tensors: weights by name, on the CPU; those of the decoder are ignored.
    """
    if not isinstance(run_config, config.TokenizerConfig):
        return None
    model = run_config.model
    # An option that a later version adds with the default null does not change the id.
    quantizer = model.quantizer.model_dump(mode="json", exclude=_OTHER_KEYS, exclude_none=True)
    options: dict[str, Any] = {
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "frames": model.frames,
        "causal": model.causal,
        "encoder": model.encoder.model_dump(mode="json", exclude_none=True),
        "quantizer": quantizer,
    }
    if model.position != "learned":
        options |= {key: getattr(model, key) for key in _POSITION_KEYS}
    return _digest(options, {name: value for name, value in tensors.items() if name.startswith(_TOKEN_PARTS)})


def _digest(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype in HALF_DTYPES:
            tensor = tensor.float()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
