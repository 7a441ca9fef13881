"""Fields of a model in `GET /v1/models`, of a loaded model or from its folder."""

from __future__ import annotations

from typing import Any

from bsq_ray import config, model_folder, storage
from bsq_ray.codec.rate import PlaneLayout, build_plane_layout


def tokenizer_fields(model_config: config.TokenizerModelConfig, tokenizer_id: str | None) -> dict[str, Any]:
    """Return the fields of a tokenizer: its id, its images and its tokens.

    With `any_size` it takes images at their own size, and size and grid are those of its training images.
    """
    bits, grid_size = model_config.quantizer.bits, model_config.grid_size
    return {
        "tokenizer_id": tokenizer_id,
        "image_size": model_config.image_size,
        "any_size": model_config.has_local_attention,
        "grid": [1, grid_size, grid_size],
        "bits": bits,
        "bits_per_pixel": bits / model_config.patch_size**2,
    }


def codec_fields(tokenizer_id: str | None, prior_id: str | None, layout: PlaneLayout | None) -> dict[str, Any]:
    """Return the fields of a codec: the ids that its files contain, and the numbers of bits per token to select from.

    Args:
        layout: planes of nested bits; None if the rate is fixed.
    """
    selectable_bits = list(layout.selectable_bits) if layout else []
    return {"tokenizer_id": tokenizer_id, "prior_id": prior_id, "selectable_bits": selectable_bits}


def generator_fields(
    model_config: config.MaskedLMModelConfig,
    sampling: config.SamplingConfig,
    model_id: str | None,
    tokenizer: dict[str, Any],
) -> dict[str, Any]:
    """Return the fields of a generator: the ids of its models, its images and its sampling.

    Args:
        tokenizer: fields of its tokenizer.
    """
    return {
        "model_id": model_id,
        "tokenizer_id": tokenizer["tokenizer_id"],
        "image_size": tokenizer["image_size"],
        "num_classes": model_config.num_classes,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
    }


def stored_fields(url: str) -> dict[str, Any]:
    """Return the fields of all roles of a model folder, without reading its weights.

    Raises:
        ValueError: the folder cannot be read.
    """
    header = model_folder.read_model_header(url)
    if isinstance(header.config, config.TokenizerConfig):
        layout = build_plane_layout(header.config.model.quantizer, None)
        return codec_fields(header.model_id, None, layout) | tokenizer_fields(header.config.model, header.model_id)
    tokenizer_url = storage.join(header.url, "tokenizer")
    tokenizer = model_folder.read_model_header(tokenizer_url)
    tokenizer_config = config.require_stage(tokenizer.config, config.TokenizerConfig, tokenizer_url)
    if isinstance(header.config, config.PriorConfig):
        layout = build_plane_layout(tokenizer_config.model.quantizer, header.config.model)
        return codec_fields(tokenizer.model_id, header.model_id, layout)
    tokenizer_entry = tokenizer_fields(tokenizer_config.model, tokenizer.model_id)
    return generator_fields(header.config.model, header.config.sampling, header.model_id, tokenizer_entry)
