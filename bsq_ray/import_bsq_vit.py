"""Imports checkpoints of the BSQ-ViT authors' published code as model folders.

Such a file is a dictionary with the weights (`state_dict`), averaged weights (`ema_state_dict`, may be None), the
discriminator's (`state_dict_discriminator`), and pickled Python objects of the training script. It is read without
running anything of it: objects of the script become inert stand-ins, and a file that asks for anything else is refused.
"""

from __future__ import annotations

import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.models.discriminators.stylegan2 import build_discriminator
from bsq_ray.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImportedModel:
    """What came out of a checkpoint.

    Attributes:
        id: of the model folder that was written.
        iteration: training step of the checkpoint, if it says so.
        has_discriminator: whether the checkpoint held a discriminator, now `discriminator.safetensors` in the folder.
    """

    model_id: str
    iteration: int | None
    has_discriminator: bool


def import_bsq_vit(
    checkpoint_url: str, config_name: str, out_url: str, weights: model_folder.WeightsKind = "ema"
) -> ImportedModel:
    """Converts a checkpoint of the published reference code into a model folder.

    Args:
        checkpoint_url: path or fsspec URL of `checkpoint.pt`.
        config_name: the preset or configuration file of the same model.
        out_url: the folder to write.
        weights: "ema" makes the averaged weights the model and keeps the plain ones beside them; "plain" takes only
            the plain ones.

    Raises:
        ValueError: the file is damaged, asks for code to be run, or holds other tensors than this model has.
    """
    run_config = config.require_stage(config.load_config(config_name), config.TokenizerConfig, config_name)
    with _local_copy(checkpoint_url) as path:
        checkpoint = read_checkpoint(path, checkpoint_url)
        raw_weights = _tokenizer_weights(run_config.model, checkpoint, "state_dict", checkpoint_url)
        ema_weights = None
        if weights == "ema":
            if not checkpoint.get("ema_state_dict"):
                raise ValueError(f"{checkpoint_url} holds no averaged weights; import its plain ones instead")
            ema_weights = _tokenizer_weights(run_config.model, checkpoint, "ema_state_dict", checkpoint_url)
        discriminator = _discriminator_weights(run_config, checkpoint, checkpoint_url)
        iteration = checkpoint.get("iter")
        card_fields = {"imported from": checkpoint_url.rsplit("/", 1)[-1]}
        if isinstance(iteration, int):
            card_fields["training steps"] = str(iteration)
        model_id = model_folder.write_model_folder(
            out_url,
            config.dump_config(run_config),
            raw_weights if ema_weights is None else ema_weights,
            None if ema_weights is None else raw_weights,
            card_fields=card_fields,
        )
        if discriminator is not None:
            data = safetensors.torch.save(discriminator, {"format": "pt"})
            storage.write_bytes(storage.join(out_url, "discriminator.safetensors"), data)
    return ImportedModel(model_id, iteration if isinstance(iteration, int) else None, discriminator is not None)


# Packages whose objects the training script leaves in its checkpoints.
_EXPECTED_PACKAGES = {"argparse", "collections", "numpy", "omegaconf", "pathlib", "typing"}
_EXPECTED_BUILTINS = {"bool", "bytes", "dict", "float", "int", "list", "object", "set", "str", "tuple"}


class _InertObject:
    """Stands in for an object whose class is not to be imported: takes any arguments and state and keeps none."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _InertObject:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainDict:
    """Stands in for a subclass of dict, which the unpickler would not fill: making one gives a plain dict."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def read_checkpoint(path: str, source: str) -> dict[str, Any]:
    """Reads a file of `torch.save` without running anything that it asks for.

    Args:
        path: a local file.
        source: what to call it in messages.

    Raises:
        ValueError: the file is damaged or refers to Python objects that such a checkpoint has no use for.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{source} is not a checkpoint as torch.save writes it, or it is damaged")
    try:
        class_names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        rejected = sorted(name for name in class_names if not _is_expected(name))
        if rejected:
            raise ValueError(f"{source} is refused: reading it would run or import {', '.join(rejected)}")
        with torch.serialization.safe_globals([_placeholder_class(name) for name in class_names]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"cannot read the checkpoint {source}: {' '.join(str(error).split())}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def _is_expected(name: str) -> bool:
    package, _, rest = name.partition(".")
    return package in _EXPECTED_PACKAGES or (package == "builtins" and rest in _EXPECTED_BUILTINS)


def _placeholder_class(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    base = _PlainDict if name == "collections.defaultdict" else _InertObject
    return type(class_name, (base,), {"__module__": module})


@contextmanager
def _local_copy(url: str) -> Iterator[str]:
    """A local path of the file, so that its tensors can be mapped instead of loaded."""
    if storage.is_local(url):
        if not storage.exists(url):
            raise ValueError(f"cannot read {url}: it does not exist")
        yield storage.filesystem(url)[1]
        return
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        with storage.open_url(url) as remote:
            shutil.copyfileobj(remote, copy, 16 * 2**20)
        copy.flush()
        yield copy.name


# Reference names, as patterns, and ours. Patterns apply one after another.
_TOKENIZER_KEY_PATTERNS = [
    (r"^(encoder|decoder)\.(positional_embedding|temporal_positional_embedding|ln_pre|ln_post)", r"\1.transformer.\2"),
    (r"\.positional_embedding$", ".spatial_position"),
    (r"\.temporal_positional_embedding$", ".temporal_position"),
    (r"\.ln_pre\.", ".input_norm."),
    (r"\.ln_post\.", ".output_norm."),
    (r"^encoder\.conv1\.", "encoder.patch_embedding."),
    (r"\.resblocks\.", ".blocks."),
    (r"\.ln_1\.", ".attention_norm."),
    (r"\.ln_2\.", ".mlp_norm."),
    (r"\.attn\.in_proj_", ".attention.qkv."),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.mlp\.c_fc\.", ".mlp.0."),
    (r"\.mlp\.c_proj\.", ".mlp.2."),
    (r"^decoder\.ffn\.0\.", "decoder.head.0."),
    (r"^decoder\.conv_out\.", "decoder.head.2."),
    (r"^quant_embed\.", "to_code."),
    (r"^post_quant_embed\.", "from_code."),
]
# Powers of two from which the reference makes integer indices; they say nothing about the model.
_INDEX_TABLES = {"quantize.basis", "quantize.group_basis"}


def _tokenizer_weights(
    model_config: config.TokenizerModelConfig, checkpoint: Mapping[str, Any], state_dict_key: str, source: str
) -> dict[str, Tensor]:
    reference = _tensors(checkpoint, state_dict_key, source)
    weights = {_rename_key(name, _TOKENIZER_KEY_PATTERNS): reference[name] for name in reference.keys() - _INDEX_TABLES}
    tokenizer = Tokenizer(model_config)
    model_folder.load_weights(tokenizer, weights, f"{source} ({state_dict_key})")
    return tokenizer.state_dict()


def _discriminator_weights(
    run_config: config.TokenizerConfig, checkpoint: Mapping[str, Any], source: str
) -> dict[str, Tensor] | None:
    """The discriminator's weights, whose names are the reference's, or None if the checkpoint has none."""
    state_dict_key = "state_dict_discriminator"
    if not checkpoint.get(state_dict_key):
        return None
    reference = _tensors(checkpoint, state_dict_key, source)
    filters = {name for name in reference if name.endswith(".resample_filter")}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for name in sorted(filters):
        if not torch.equal(reference[name].float(), torch.outer(taps, taps)):
            raise ValueError(f"{source} ({state_dict_key}): {name} is another low-pass filter than [1, 3, 3, 1] / 8")
    discriminator = build_discriminator(run_config.loss.adversarial, run_config.model.image_size)
    weights = {name: reference[name] for name in reference.keys() - filters}
    model_folder.load_weights(discriminator, weights, f"{source} ({state_dict_key})")
    return discriminator.state_dict()


def _tensors(checkpoint: Mapping[str, Any], state_dict_key: str, source: str) -> dict[str, Tensor]:
    """The tensors of a part by name, without the prefixes of the wrappers (`module.`) they were saved through."""
    tensors = checkpoint.get(state_dict_key)
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{source} holds no weights called {state_dict_key}; its keys are {', '.join(map(str, checkpoint))}"
        )
    tensors = dict(tensors)
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _rename_key(key: str, patterns: list[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key
