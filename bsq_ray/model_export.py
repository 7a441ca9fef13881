"""Export a model folder for publication: weights of 16 bits, without the files that only training reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.model_card import CardContent, parse_model_card
from bsq_ray.model_ids import KeptTokens

ExportDtype = Literal["float16", "bfloat16", "float32"]

_DTYPES: dict[ExportDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class ExportedModel:
    """Result of an export.

    Attributes:
        model_id: id of the written model; another one than before if rounding changed a weight.
        num_bytes: size of the weights file.
        tokens_changed: rounding changed the tokens of a tokenizer, so that models on its tokens need new ones.
    """

    model_id: str
    num_bytes: int
    tokens_changed: bool


def export_model(
    url: str,
    out_url: str,
    dtype: ExportDtype = "float16",
    weights: model_folder.WeightsKind = "ema",
    card: CardContent = CardContent(),
    prior_side: int | None = None,
) -> ExportedModel:
    """Write a model folder with one set of weights in the given data type, and the card of the source.

    Computations stay in fp32, because weights are loaded as fp32. Raw weights and the discriminator are not written.
    The tokenizer of a token model is copied unchanged: other weights would have other tokens.

    Args:
        url: model folder to export.
        out_url: folder to write.
        dtype: data type of the stored weights.
        weights: "ema" or "raw" weights of the source.
        card: further rows of the card, and metrics that replace those of the training.
        prior_side: rows and columns of tokens that a prior predicts together, at most those of its training; None: the
            same as in training. See `_reduce_prior`.

    Raises:
        ValueError: the source cannot be read, the destination is the source, a weight is too large for the type, or
            the model has no such reduced form.
    """
    folder_url = model_folder.resolve_folder(url)
    if storage.absolute(folder_url) == storage.absolute(out_url):
        raise ValueError(f"{out_url} is the model to export; choose another folder for the result")
    folder = model_folder.load_model_folder(folder_url, weights)
    trained_config = folder.config
    if prior_side is not None:
        folder = _reduce_prior(folder, folder_url, prior_side)
    card_url = storage.join(folder_url, "README.md")
    source_card = parse_model_card(storage.read_text(card_url)) if storage.exists(card_url) else CardContent()
    rounded = {name: _round(name, value, _DTYPES[dtype]) for name, value in folder.weights.items()}
    is_exact = all(torch.equal(rounded[name].float(), value.float()) for name, value in folder.weights.items())
    _, _, earlier_rounding = source_card.fields.get("weights", "").partition(", ")
    rounding = earlier_rounding if is_exact else f"rounded from the float32 weights of model {folder.model_id[:12]}"
    stored_as = ", ".join(filter(None, (dtype, rounding)))
    if prior_side is not None:
        source_card = note_prior_side(source_card, trained_config, prior_side)
    card = source_card.merge(card)
    kept_tokens = KeptTokens(folder.tokens_id, folder.same_tokens) if folder.tokens_id and folder.same_tokens else None
    model_id = model_folder.write_model_folder(
        out_url,
        config.dump_config(folder.config),
        rounded,
        metrics=card.metrics,
        card_fields=card.fields | {"weights": stored_as},
        measured_on=card.measured_on,
        kept_tokens=kept_tokens,
        kind=folder.kind,
    )
    bundled_url = storage.join(folder_url, _TOKENIZER_FOLDER)
    if storage.exists(storage.join(bundled_url, "config.yaml")):
        storage.copy_folder(bundled_url, storage.join(out_url, _TOKENIZER_FOLDER))
    header = model_folder.read_model_header(out_url)
    tokens_changed = (
        folder.tokens_id is not None and model_folder.load_model_folder(out_url).tokens_id != folder.tokens_id
    )
    return ExportedModel(model_id, header.num_bytes, tokens_changed)


def note_prior_side(card: CardContent, trained_config: config.AnyConfig, side: int) -> CardContent:
    """Return the card with the tokens that the prior predicted together in training and in its metrics."""
    assert isinstance(trained_config, config.PriorConfig)
    _, rows, columns = trained_config.model.grid
    if (rows, columns) == (side, side):
        return card
    tiles = f"tiles of {rows} x {columns} tokens"
    return card.model_copy(
        update={
            "fields": card.fields | {"trained with": f"{tiles}; exported for {side} x {side}"},
            "measured_on": card.measured_on and f"{card.measured_on}, {tiles}",
        }
    )


def _reduce_prior(folder: model_folder.ModelFolder, url: str, side: int) -> model_folder.ModelFolder:
    """Return a prior of the upper left `side` x `side` tokens of its grid.

    Attention costs time quadratic in the tokens of a tile, so the codec becomes faster, and files become larger because
    tokens have less context. Tokens above and to the left are in the same places as in training.

    Raises:
        ValueError: this is no prior of images, its grid is smaller, or its tokenizer takes images of one size only.
    """
    run = folder.config
    if not isinstance(run, config.PriorConfig):
        raise ValueError(f"--prior-side is for priors; {url} is a model of stage {run.stage}")
    frames, rows, columns = run.model.grid
    tokenizer_url = storage.join(url, _TOKENIZER_FOLDER)
    tokenizer = config.require_stage(
        model_folder.load_model_folder_config(tokenizer_url), config.TokenizerConfig, tokenizer_url
    )
    if frames > 1 or not tokenizer.model.any_size:
        raise ValueError(f"{url} keeps its tiles: --prior-side is for priors of images with a tokenizer for any size")
    if not 1 <= side <= min(rows, columns):
        raise ValueError(f"{url} predicts {rows} x {columns} tokens together; choose at most {min(rows, columns)}")
    if side % tokenizer.model.position_period:
        raise ValueError(
            f"tiles of {side} x {side} tokens do not fit the repeating position embeddings of {tokenizer_url}; choose "
            f"a multiple of model.position_period {tokenizer.model.position_period}"
        )
    model_config = run.model.model_copy(update={"grid": (1, side, side)})
    position_RCD = folder.weights["position"].unflatten(0, (rows, columns))
    return replace(
        folder,
        config=run.model_copy(update={"model": model_config}),
        weights=folder.weights | {"position": position_RCD[:side, :side].flatten(0, 1).contiguous()},
    )


def _round(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor of floats; return any other tensor unchanged."""
    if not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    if not torch.equal(rounded.isfinite(), value.isfinite()):
        raise ValueError(f"{name} contains values above {torch.finfo(dtype).max:g}; choose --dtype bfloat16 or float32")
    return rounded
