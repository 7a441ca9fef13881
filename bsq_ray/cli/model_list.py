"""Describe the models of the package."""

from __future__ import annotations

from bsq_ray import config, model_folder
from bsq_ray.model_card import parse_model_card
from bsq_ray.shipped_models.catalog import ShippedModel, describe_shipped_models, list_shipped_models


def format_models() -> str:
    """Return name, kind, size, tokens, description and measurements of each model of the package.

    Raises:
        ValueError: a model folder is damaged.
    """
    models = list_shipped_models()
    return "\n\n".join(map(_format_model, models)) if models else describe_shipped_models()


def _format_model(model: ShippedModel) -> str:
    header = model_folder.read_model_header(str(model.folder))
    lines = [
        f"{model.name}: {header.config.stage}, {header.num_bytes / 1e6:.1f} MB, {_format_bits(header.config)}",
        *([f"  {header.config.description}"] if header.config.description else []),
        f"  {model.folder}",
    ]
    card = parse_model_card((model.folder / "README.md").read_text())
    if card.metrics:
        values = ", ".join(f"{name} {value:g}" for name, value in card.metrics.items())
        lines.append(f"  {values}{f' on {card.measured_on}' if card.measured_on else ''}")
    return "\n".join(lines)


def _format_bits(run_config: config.AnyConfig) -> str:
    if not isinstance(run_config, config.TokenizerConfig):
        return f"tokens of {run_config.model.bits} bits"
    quantizer, patch_size = run_config.model.quantizer, run_config.model.patch_size
    text = f"tokens of {quantizer.bits} bits, {quantizer.bits / patch_size**2:g} bits per pixel"
    keep = quantizer.keep if isinstance(quantizer, config.BSQConfig | config.LFQConfig) else ()
    return f"{text}, nested after {', '.join(map(str, keep))} bits" if keep else text
