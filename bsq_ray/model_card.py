"""The model card of a model folder: front matter for model hubs, description, example, properties and metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import Field

from bsq_ray import config
from bsq_ray.config.base import StrictModel

# Rows that every card gets from the model and its configuration.
_MODEL_ROWS = {"model id", "input", "output", "tokens", "rate", "classes"}
# Cells of a table row; a bar inside a cell is escaped.
_ROW = re.compile(r"\| (?P<name>.*?) \| (?P<value>.*) \|")


class CardContent(StrictModel):
    """Parts of a model card that do not follow from the model.

    Attributes:
        fields: rows of the card, such as data, licenses, recipe and seeds.
        metrics: measured values by name.
        measured_on: samples, data set and precision of the metrics.
    """

    fields: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    measured_on: str = ""

    def merge(self, newer: CardContent) -> CardContent:
        """Return a card with the rows of both; metrics are those of `newer` if it has any."""
        measured = newer if newer.metrics else self
        return CardContent(
            fields=self.fields | newer.fields, metrics=measured.metrics, measured_on=measured.measured_on
        )


def parse_model_card(text: str) -> CardContent:
    """Return what a card of `render_model_card` contains besides the properties of its model."""
    properties, _, measurements = text.partition("| metric | value |")
    measured_on = re.search(r"^Measured on (.*)\.$", properties, re.MULTILINE)
    fields = {name: value for name, value in _read_rows(properties) if name not in _MODEL_ROWS}
    metrics = {name: float(value) for name, value in _read_rows(measurements)}
    return CardContent(fields=fields, metrics=metrics, measured_on=measured_on[1] if measured_on else "")


def render_model_card(
    run_config: config.AnyConfig,
    model_id: str,
    metrics: Mapping[str, float],
    card_fields: Mapping[str, str],
    measured_on: str,
) -> str:
    """Render the model card: front matter for model hubs, description, example, properties and metrics."""
    if isinstance(run_config, config.TokenizerConfig):
        tags, example, model_rows = _tokenizer_card(run_config)
    else:
        tags, example, model_rows = (
            _masked_lm_card(run_config) if isinstance(run_config, config.MaskedLMConfig) else _prior_card(run_config)
        )
    rows = {"model id": f"`{model_id}`", **model_rows, **card_fields}
    table = ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]
    if metrics:
        table += [
            "",
            *([f"Measured on {measured_on}.", ""] if measured_on else []),
            "| metric | value |",
            "|---|---|",
            *(f"| {_cell(name)} | {value:.5g} |" for name, value in metrics.items()),
        ]
    heading = [
        "---",
        "library_name: bsq_ray",
        f"tags: [{tags}, binary-spherical-quantization]",
        "---",
        f"# {run_config.name}",
    ]
    description = [run_config.description, ""] if run_config.description else []
    return "\n".join([*heading, "", *description, "```python", *example, "```", "", *table, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _read_rows(text: str) -> list[tuple[str, str]]:
    matches = (_ROW.fullmatch(line) for line in text.splitlines())
    return [(match["name"], match["value"].replace(r"\|", "|")) for match in matches if match and match["name"].strip()]


def _tokenizer_card(run_config: config.TokenizerConfig) -> tuple[str, list[str], dict[str, str]]:
    model = run_config.model
    sides = "H, W" if model.any_size else f"{model.image_size}, {model.image_size}"
    shape = f"(B, 3, {f'1 to {model.frames}, ' if model.frames > 1 else ''}{sides})"
    example = [
        "from bsq_ray import Tokenizer",
        "",
        'tokenizer = Tokenizer.from_pretrained("path or URL of this folder")',
        f"tokens = tokenizer.encode(images)  # floats in [-1, 1], {shape}",
        "images = tokenizer.decode(tokens)",
    ]
    if model.frames > 1 and model.causal:
        example += [
            "stream = tokenizer.encode_stream(chunks)  # clips of any length, chunk by chunk",
            "frames = tokenizer.decode_stream(stream)",
        ]
    unit = "image" if model.frames == 1 else "frame"
    rows = {
        "input": ("any size, trained at " if model.any_size else "")
        + f"{model.image_size} x {model.image_size} pixels"
        + (f", up to {model.frames} frames" if model.frames > 1 else ""),
        "tokens": ("" if model.any_size else f"{model.grid_size**2} per {unit}, ")
        + f"one per {model.patch_size} x {model.patch_size} pixels, {model.quantizer.bits} bits each "
        f"({model.quantizer.kind})",
        "rate": f"{model.quantizer.bits / model.patch_size**2:g} bits per pixel before entropy coding",
    }
    return "image-tokenizer" if model.frames == 1 else "video-tokenizer", example, rows


def _masked_lm_card(run_config: config.MaskedLMConfig) -> tuple[str, list[str], dict[str, str]]:
    model = run_config.model
    example = [
        "from bsq_ray import Generator",
        "",
        'generator = Generator.from_pretrained("path or URL of this folder")',
        "images = generator.generate([0, 1, 2], seed=0)  # classes; floats in [-1, 1]",
    ]
    rows = {
        "output": f"{' x '.join(map(str, model.grid))} tokens of {model.bits} bits, {model.num_sub_tokens} sub-tokens "
        f"of {model.sub_bits} bits each; the tokenizer is in `tokenizer/`",
        "classes": str(model.num_classes),
    }
    return "image-generation", example, rows


def _prior_card(run_config: config.PriorConfig) -> tuple[str, list[str], dict[str, str]]:
    model = run_config.model
    example = [
        "from bsq_ray import Codec",
        "",
        'codec = Codec.from_pretrained("path or URL of this folder")',
        "data = codec.compress(image)  # a PIL image of any size",
        "image = codec.decompress(data)",
    ]
    rows = {
        "tokens": f"{' x '.join(map(str, model.grid))} of {model.bits} bits, {model.num_sub_tokens} sub-tokens of "
        f"{model.sub_bits} bits each; the tokenizer is in `tokenizer/`",
    }
    return "image-compression", example, rows
