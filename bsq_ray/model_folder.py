"""Model folders: a trained model in a local folder or at an fsspec URL.

config.yaml               configuration of the run
model.safetensors         weights: the EMA if training maintained one, otherwise the raw weights
model.plain.safetensors   raw weights, only if model.safetensors contains the EMA
README.md                 model card

Weights are stored as fp32, or as fp16 or bf16 in exported models; all of them are loaded as fp32.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bsq_ray import config, storage
from bsq_ray.model_card import render_model_card
from bsq_ray.model_ids import HALF_DTYPES, KeptTokens, compute_model_id, compute_tokens_id
from bsq_ray.runtime.wrong_files import describe_wrong_binary
from bsq_ray.shipped_models.catalog import describe_shipped_models, find_shipped_model

WeightsKind = Literal["ema", "raw"]

_WEIGHTS_FILE, _RAW_WEIGHTS_FILE = "model.safetensors", "model.plain.safetensors"
_DISCRIMINATOR_FILE = "discriminator.safetensors"
# Value of the metadata key "weights" for raw weights; part of the file format.
_RAW_METADATA = "plain"
# Metadata key of the ids of earlier models with the same tokens, separated by commas.
_SAME_TOKENS_METADATA = "same_tokens"


@dataclass(frozen=True)
class ModelFolder:
    """Contents of a model folder.

    Attributes:
        config: training configuration of the model.
        weights: tensors by name, on the CPU; floating-point weights are fp32.
        kind: "ema" if `weights` were averaged, otherwise "raw".
        model_id: SHA-256 (hexadecimal) of the `model` part of the configuration and the weights.
        tokens_id: id that all decoders of the same tokens share, see `model_ids`; None if this is not a tokenizer.
        same_tokens: ids of earlier models with the same tokens, whose decoder was trained further.
    """

    config: config.AnyConfig
    weights: dict[str, Tensor]
    kind: WeightsKind
    model_id: str
    tokens_id: str | None = None
    same_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelHeader:
    """Contents of a model folder besides its weights.

    Attributes:
        url: the folder, or the local copy of a model from a model hub.
        config: training configuration of the model.
        model_id: stored id of the model.
        num_bytes: size of the file of its main weights.
        same_tokens: see `ModelFolder`.
    """

    url: str
    config: config.AnyConfig
    model_id: str
    num_bytes: int
    same_tokens: tuple[str, ...] = ()


def write_model_folder(
    url: str,
    config_text: str,
    weights: Mapping[str, Tensor],
    raw_weights: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, float] | None = None,
    card_fields: Mapping[str, str] | None = None,
    measured_on: str = "",
    kept_tokens: KeptTokens | None = None,
    kind: WeightsKind | None = None,
) -> str:
    """Write a model folder, replacing the model in it.

    Args:
        url: path or fsspec URL of the folder.
        config_text: configuration as YAML; defaults are added before it is written.
        weights: main weights, loaded by default.
        raw_weights: raw weights, if `weights` are an EMA; None if `weights` are raw, or the raw ones are not published.
        metrics: metrics for the model card, by name.
        card_fields: additional rows of the model card, for example the data set and its hash.
        measured_on: samples, data set and precision of the metrics, for the model card.
        kept_tokens: tokens of earlier models; recorded if the weights still produce them.
        kind: kind of `weights`; None: an EMA if there are raw weights, otherwise raw.

    Returns:
        The id of the model.

    Raises:
        ValueError: the configuration is invalid or the folder cannot be written.
    """
    run_config = config.parse_config(config_text, "the configuration of the model")
    text = config.dump_config(run_config)
    is_raw = raw_weights is None if kind is None else kind == "raw"
    stored_kind = _RAW_METADATA if is_raw else "ema"
    model_id = _write_weights(storage.join(url, _WEIGHTS_FILE), text, weights, stored_kind, kept_tokens)
    if raw_weights is None:
        storage.remove(storage.join(url, _RAW_WEIGHTS_FILE))
    else:
        _write_weights(storage.join(url, _RAW_WEIGHTS_FILE), text, raw_weights, _RAW_METADATA, kept_tokens)
    storage.write_text(
        storage.join(url, "README.md"),
        render_model_card(run_config, model_id, metrics or {}, card_fields or {}, measured_on),
    )
    storage.write_text(storage.join(url, "config.yaml"), text)
    return model_id


def absolute_url(url: str) -> str:
    """Return a name of the model folder that is valid in a process with another working folder.

    The name of a shipped model becomes its folder. Any other name that is not an existing local path stays as it is: it
    may be the id of a model hub.
    """
    url = _shipped_folder(url) or url
    return storage.absolute(url) if storage.is_local(url) and storage.exists(url) else url


def load_model_folder(url: str, weights: WeightsKind = "ema") -> ModelFolder:
    """Read a model folder from a path, an fsspec URL, the name of a shipped model, or an id such as `someone/bsq-18`.

    A local folder with a `config.yaml` takes precedence over the shipped model of the same name.

    Args:
        weights: "ema" for the main weights of the folder, "raw" for the weights without EMA.

    Raises:
        ValueError: the folder does not exist, a file is missing or damaged, or weights and configuration do not match.
    """
    folder = resolve_folder(url)
    text = storage.read_text(storage.join(folder, "config.yaml"))
    run_config = config.parse_config(text, storage.join(folder, "config.yaml"))
    has_raw_file = weights == "raw" and storage.exists(storage.join(folder, _RAW_WEIGHTS_FILE))
    path = storage.join(folder, _RAW_WEIGHTS_FILE if has_raw_file else _WEIGHTS_FILE)
    tensors, header = _read_weights(path)
    if weights == "raw" and header["weights"] != _RAW_METADATA:
        raise ValueError(
            f"{url} contains no raw weights: {_RAW_WEIGHTS_FILE} is missing and {_WEIGHTS_FILE} contains the EMA"
        )
    model_id = compute_model_id(text, tensors)
    if model_id != header["id"]:
        raise ValueError(
            f"{path} and {storage.join(folder, 'config.yaml')} do not match: one of them changed after the model was "
            f"written (stored id {header['id'][:12]}, computed id {model_id[:12]}); write or download the folder again"
        )
    kind: WeightsKind = "raw" if header["weights"] == _RAW_METADATA else "ema"
    return ModelFolder(
        run_config, tensors, kind, model_id, compute_tokens_id(run_config, tensors), _parse_same_tokens(header)
    )


def load_model_folder_config(url: str) -> config.AnyConfig:
    """Read the configuration of a model folder without its weights.

    Raises:
        ValueError: the folder does not exist, or its configuration is invalid.
    """
    path = storage.join(resolve_folder(url), "config.yaml")
    return config.parse_config(storage.read_text(path), path)


def read_model_header(url: str) -> ModelHeader:
    """Read the configuration and the header of the main weights; the weights themselves are neither read nor verified.

    Raises:
        ValueError: the folder does not exist, its configuration is invalid, or its weights have no header.
    """
    folder = resolve_folder(url)
    path = storage.join(folder, "config.yaml")
    run_config = config.parse_config(storage.read_text(path), path)
    weights_url = storage.join(folder, _WEIGHTS_FILE)
    with storage.open_url(weights_url) as file, storage.translate_errors(weights_url, "read"):
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        header_size = int.from_bytes(file.read(8), "little")
        data = file.read(header_size) if header_size < num_bytes else b""
    try:
        metadata = json.loads(data)["__metadata__"]
        model_id = metadata["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{weights_url} is damaged or not part of a model folder: it has no model id") from error
    return ModelHeader(folder, run_config, model_id, num_bytes, _parse_same_tokens(metadata))


def load_discriminator_weights(url: str) -> dict[str, Tensor] | None:
    """Read the weights of the discriminator that a model was trained with; None if the folder has none.

    Raises:
        ValueError: the folder does not exist, or the file is damaged.
    """
    path = storage.join(resolve_folder(url, (_DISCRIMINATOR_FILE,)), _DISCRIMINATOR_FILE)
    if not storage.exists(path):
        return None
    return _parse_safetensors(storage.read_bytes(path), path)[0]


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a module after checking all keys and shapes.

    Args:
        module: the module, unchanged if an error is raised.
        weights: tensors by name.
        source: origin of the weights, for the error message.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ.
    """
    expected = module.state_dict()
    shapes = [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    mismatches = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "wrong shape": shapes,
    }
    if any(mismatches.values()):
        details = "; ".join(f"{kind}: {_truncate(sorted(keys))}" for kind, keys in mismatches.items() if keys)
        raise ValueError(f"the weights of {source} do not match this model ({details})")
    module.load_state_dict(dict(weights))


def resolve_folder(url: str, hub_files: Sequence[str] = (_WEIGHTS_FILE, _RAW_WEIGHTS_FILE)) -> str:
    """Return `url` if it is a model folder, the folder of a shipped model, or a local copy of one from a model hub.

    Args:
        hub_files: files of the model that are copied from the hub.

    Raises:
        ValueError: there is no such model.
    """
    model_url = storage.join(url, "model")
    if storage.exists(storage.join(model_url, _WEIGHTS_FILE)) and not storage.exists(storage.join(url, _WEIGHTS_FILE)):
        raise ValueError(f"{url} is a run folder; use its model folder {model_url}")
    if storage.exists(storage.join(url, "config.yaml")):
        return url
    if shipped_url := _shipped_folder(url):
        return shipped_url
    parent_exists = "/" in url and storage.exists(url.rpartition("/")[0] or "/")
    if parent_exists and not storage.exists(url):
        raise ValueError(f"model folder {url} does not exist")
    if "/" not in url and not storage.exists(url):
        raise ValueError(
            f"model folder {url} does not exist, and no shipped model has this name: {describe_shipped_models()}"
        )
    if parent_exists or storage.exists(url) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", url):
        raise ValueError(f"{url} is not a model folder: it has no config.yaml")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"model folder {url} does not exist; to load it from the model hub, install huggingface_hub"
        ) from None
    try:
        return str(snapshot_download(url, allow_patterns=["config.yaml", *hub_files]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model folder {url} does not exist, and the model hub returned an error: {' '.join(str(error).split())}"
        ) from error


def _shipped_folder(url: str) -> str | None:
    """Return the folder of the shipped model with this name, unless a local model or run folder has the name, too."""
    if "/" in url or storage.is_url(url) or storage.exists(storage.join(url, "config.yaml")):
        return None
    model = find_shipped_model(url)
    return None if model is None else str(model.folder)


def _write_weights(
    url: str, config_text: str, weights: Mapping[str, Tensor], kind: str, kept_tokens: KeptTokens | None
) -> str:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    model_id = compute_model_id(config_text, tensors)
    metadata = {"format": "pt", "id": model_id, "weights": kind}
    if kept_tokens is not None:
        run_config = config.parse_config(config_text, "the configuration of the model")
        if compute_tokens_id(run_config, tensors) == kept_tokens.tokens_id:
            metadata[_SAME_TOKENS_METADATA] = ",".join(kept_tokens.model_ids)
    storage.write_bytes(url, safetensors.torch.save(tensors, metadata))
    return model_id


def _read_weights(url: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, header = _parse_safetensors(storage.read_bytes(url), url)
    if not {"id", "weights"} <= header.keys():
        raise ValueError(f"{url} is not part of a model folder: its metadata has no model id")
    return {name: value.float() if value.dtype in HALF_DTYPES else value for name, value in tensors.items()}, header


def _parse_same_tokens(metadata: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(filter(None, metadata.get(_SAME_TOKENS_METADATA, "").split(",")))


def _parse_safetensors(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        description = describe_wrong_binary(data) or f"is damaged or not a safetensors file: {error}"
        raise ValueError(f"{source} {description}") from error
    return tensors, header


def _truncate(keys: list[str], max_keys: int = 5) -> str:
    more = f" and {len(keys) - max_keys} more" if len(keys) > max_keys else ""
    return ", ".join(keys[:max_keys]) + more
