"""Commands about model folders: list those of the package, export one for publication."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.options import WeightsOption, parse_dtype, parse_weights


def models() -> None:
    """List the models that are part of the package, with their measurements."""
    from bsq_ray.cli.model_list import format_models

    print(format_models())


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, such as RUN/model.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of the exported model.")],
    dtype: Annotated[str, typer.Option(help="Data type of the stored weights: float16, bfloat16 or float32.")] = (
        "float16"
    ),
    card: Annotated[
        str | None,
        typer.Option(help="YAML file with parts of the model card: fields (texts), metrics (numbers), measured_on."),
    ] = None,
    weights: WeightsOption = "ema",
) -> None:
    """Write a model folder for publication: weights of 16 bits, without raw weights and discriminator."""
    from bsq_ray.config.loader import load_yaml_as
    from bsq_ray.model_card import CardContent
    from bsq_ray.model_export import export_model

    content = CardContent() if card is None else load_yaml_as(card, CardContent)
    exported = export_model(model, out, parse_dtype(dtype), parse_weights(weights), content)
    print(f"exported model {exported.model_id[:12]} to {out}, {exported.num_bytes / 1e6:.1f} MB")
    if exported.tokens_changed:
        print("rounding changed the tokens: tokenize and train token models with the exported tokenizer")
