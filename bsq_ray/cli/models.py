"""Commands about model folders: list those of the package, train them, export one for publication."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsq_ray.cli.extras import require_extra
from bsq_ray.cli.options import WeightsOption, parse_device, parse_dtype, parse_weights


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
    prior_side: Annotated[
        int | None,
        typer.Option(min=1, help="Rows and columns of tokens that a prior predicts together. Default: as in training."),
    ] = None,
    weights: WeightsOption = "ema",
) -> None:
    """Write a model folder for publication: weights of 16 bits, without raw weights and discriminator."""
    from bsq_ray.config.loader import load_yaml_as
    from bsq_ray.model_card import CardContent
    from bsq_ray.model_export import export_model

    content = CardContent() if card is None else load_yaml_as(card, CardContent)
    exported = export_model(model, out, parse_dtype(dtype), parse_weights(weights), content, prior_side)
    print(f"exported model {exported.model_id[:12]} to {out}, {exported.num_bytes / 1e6:.1f} MB")
    if exported.tokens_changed:
        print("rounding changed the tokens: tokenize and train token models with the exported tokenizer")


def pretrain(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Recipe. Default: list all recipes.")] = None,
    out: Annotated[Path, typer.Option(help="Working folder of data and runs.")] = Path("pretrained"),
    minutes: Annotated[
        float | None, typer.Option(help="Training time of all models, minutes. Default: the steps of the presets.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, gpu, or auto: a GPU if there is one.")] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Training processes on Ray, which also reads the data. 0: without Ray.")
    ] = 0,
    models_folder: Annotated[
        Path | None, typer.Option(help="Folder of the trained models. Default: that of the package.")
    ] = None,
) -> None:
    """Train the models of the package. The same command resumes an interrupted training."""
    require_extra("pretrain", "train", *(("ray",) if workers else ()))

    from bsq_ray.demos.pretrain import find_recipe, format_recipes, run_recipe

    if recipe is None:
        print(format_recipes())
        return
    folder = run_recipe(
        find_recipe(recipe),
        out,
        minutes=minutes,
        device=parse_device(device),
        num_workers=workers,
        models_folder=models_folder,
    )
    print(f"model: {folder}")
