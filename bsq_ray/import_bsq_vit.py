"""Import of checkpoints of the BSQ-ViT authors' published code as model folders.

Such a file is a dictionary with the weights (`state_dict`), averaged weights (`ema_state_dict`, may be None), the
discriminator (`state_dict_discriminator`), and pickled Python objects of the training script. Pickled code is never
executed: objects of the training script become inert placeholders, and files with other objects are rejected.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bsq_ray import config, model_folder, storage
from bsq_ray.models.discriminators import build_discriminator
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.runtime.wrong_files import describe_wrong_binary


@dataclass(frozen=True)
class ImportedModel:
    """Result of an import.

    Attributes:
        model_id: id of the written model folder.
        iteration: training step of the checkpoint, or None if the file does not contain it.
        has_discriminator: whether the checkpoint contains a discriminator, now `discriminator.safetensors`.
    """

    model_id: str
    iteration: int | None
    has_discriminator: bool


def import_bsq_vit(
    checkpoint_url: str, config_name: str, out_url: str, weights: model_folder.WeightsKind = "ema"
) -> ImportedModel:
    """Convert a checkpoint of the published reference code to a model folder.

    Args:
        checkpoint_url: path or fsspec URL of `checkpoint.pt`.
        config_name: preset or configuration file of the same model.
        out_url: folder to write.
        weights: "ema" writes averaged and raw weights; "raw" writes only the raw weights.

    Raises:
        ValueError: the file is damaged, contains unexpected objects, or its tensors do not match the model.
    """
    run_config = config.require_stage(config.load_config(config_name), config.TokenizerConfig, config_name)
    with _local_copy(checkpoint_url) as path:
        checkpoint = read_checkpoint(path, checkpoint_url)
        raw_weights = _tokenizer_weights(run_config.model, checkpoint, "state_dict", checkpoint_url)
        ema_weights = None
        if weights == "ema":
            if not checkpoint.get("ema_state_dict"):
                raise ValueError(f"{checkpoint_url} contains no averaged weights; import its raw weights instead")
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


_HEAD_BYTES = 2**16
# Files of torch before 1.6 start with the pickled number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_OTHER_PROTOCOL = re.compile(rb"\x80([\x03-\x05])(?:\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", re.S)
_PROTOCOL_HINT = (
    "load it with `torch.load` where it was made, and save it with the default `pickle_protocol` of torch.save"
)
# Magic number, protocol version, system, content, names of the storages.
_NUM_LEGACY_PICKLES = 5
# Packages whose objects the training script leaves in its checkpoints.
_EXPECTED_PACKAGES = {"argparse", "collections", "numpy", "omegaconf", "pathlib", "typing"}
_EXPECTED_BUILTINS = {"bool", "bytes", "dict", "float", "int", "list", "object", "set", "str", "tuple"}


class _InertObject:
    """Placeholder of an object whose class is not imported; accepts and ignores any arguments and state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _InertObject:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainDict:
    """Placeholder of a dict subclass; creates a plain dict, because the unpickler does not fill subclasses."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def read_checkpoint(path: str, source: str) -> dict[str, Any]:
    """Read a file of `torch.save` without executing code from it.

    Args:
        path: local file.
        source: name of the file in error messages.

    Raises:
        ValueError: the file is damaged or refers to unexpected Python objects.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and not head.startswith(_LEGACY_MAGIC):
        raise ValueError(f"{source} {_describe_wrong_checkpoint(head)}")
    try:
        class_names = _zip_globals(path, source) if is_zip else _legacy_globals(path, source)
        rejected = sorted(name for name in class_names if not _is_expected(name))
        if rejected:
            raise ValueError(f"{source} is rejected: it has objects that would run or import {', '.join(rejected)}")
        with torch.serialization.safe_globals([_placeholder_class(name) for name in class_names]):
            # Files of torch before 1.6 cannot be memory-mapped.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        struct.error,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        UnicodeDecodeError,
    ) as error:
        raise ValueError(_format_torch_error(error, source)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} contains a {type(checkpoint).__name__}, not the dictionary of a checkpoint")
    return checkpoint


def _describe_wrong_checkpoint(head: bytes) -> str:
    """Return a predicate that describes a file that torch cannot load."""
    if match := _OTHER_PROTOCOL.match(head):
        return f"is written with pickle protocol {match[1][0]}; {_PROTOCOL_HINT}"
    if head[8:10] == b'{"':
        return "is a safetensors file, which has weights only; import the checkpoint that torch.save wrote"
    return describe_wrong_binary(head) or "is not a file written by torch.save, or it is damaged"


def _format_torch_error(error: Exception, source: str) -> str:
    text = " ".join(str(error).split())
    if match := re.search(r"GLOBAL ([\w.]+) was not an allowed", text):
        return f"{source} is rejected: it has objects that would run or import {match[1]}"
    hint = f"; {_PROTOCOL_HINT}" if "Unsupported operand" in text else ""
    return f"cannot read the checkpoint {source}: {text}{hint}"


def _zip_globals(path: str, source: str) -> list[str]:
    """Return the names of the Python objects in a file of `torch.save`, except those of torch.

    Raises:
        ValueError: it is another zip file, or a TorchScript archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            is_checkpoint = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        # torch reads some of these files; it gives the reason for the others.
        is_checkpoint = True
    if not is_checkpoint:
        raise ValueError(f"{source} is a zip file, but not one that torch.save wrote; unpack it first")
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError as error:
        raise ValueError(_format_torch_error(error, source)) from error


def _legacy_globals(path: str, source: str) -> list[str]:
    """Return the names of the Python objects, except those of torch, in a file of `torch.save` before torch 1.6.

    Such a file is a sequence of pickles, followed by the tensors' values. Nothing is unpickled.

    Raises:
        ValueError: a pickle is damaged, or of a newer protocol than these files have.
    """
    names: set[str] = set()
    with open(path, "rb") as file:
        try:
            for operation, argument, _ in chain(*(pickletools.genops(file) for _ in range(_NUM_LEGACY_PICKLES))):
                if operation.name in ("GLOBAL", "INST"):
                    # These pickles have the name of Python 2.
                    names.add(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
                elif operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                    raise ValueError(f"the pickle operation {operation.name} is not allowed")
        except ValueError as error:
            raise ValueError(f"cannot read the checkpoint {source}: {error}") from error
    # `torch.load` itself knows which objects of torch are plain data, and how bytes are encoded.
    return sorted(name for name in names if not name.startswith("torch.") and name != "_codecs.encode")


def _is_expected(name: str) -> bool:
    package, _, rest = name.partition(".")
    return package in _EXPECTED_PACKAGES or (package == "builtins" and rest in _EXPECTED_BUILTINS)


def _placeholder_class(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    base = _PlainDict if name == "collections.defaultdict" else _InertObject
    return type(class_name, (base,), {"__module__": module})


@contextmanager
def _local_copy(url: str) -> Iterator[str]:
    """Provide the path of a local regular file, so that its tensors can be memory-mapped."""
    if storage.is_local(url) and not storage.is_special(url):
        if not storage.exists(url):
            raise ValueError(f"cannot read {url}: it does not exist")
        yield storage.filesystem(url)[1]
        return
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        with storage.open_url(url) as remote:
            shutil.copyfileobj(remote, copy, 16 * 2**20)
        copy.flush()
        yield copy.name


# Patterns of the reference names, and our names. Patterns apply one after another.
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
# Powers of two that the reference uses for integer indices; they are not weights.
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
    """Return the weights of the discriminator, named as in the reference, or None if the checkpoint has none."""
    state_dict_key = "state_dict_discriminator"
    if not checkpoint.get(state_dict_key):
        return None
    reference = _tensors(checkpoint, state_dict_key, source)
    filters = {name for name in reference if name.endswith(".resample_filter")}
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    for name in sorted(filters):
        if not torch.equal(reference[name].float(), torch.outer(taps, taps)):
            raise ValueError(f"{source} ({state_dict_key}): {name} is not the low-pass filter [1, 3, 3, 1] / 8")
    discriminator = build_discriminator(run_config.loss.adversarial, run_config.model.image_size)
    weights = {name: reference[name] for name in reference.keys() - filters}
    model_folder.load_weights(discriminator, weights, f"{source} ({state_dict_key})")
    return discriminator.state_dict()


def _tensors(checkpoint: Mapping[str, Any], state_dict_key: str, source: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name, without the prefix `module.` of wrappers."""
    tensors = checkpoint.get(state_dict_key)
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{source} contains no weights {state_dict_key}; its keys are {', '.join(map(str, checkpoint))}"
        )
    tensors = dict(tensors)
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _rename_key(key: str, patterns: list[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key
