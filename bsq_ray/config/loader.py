"""Loading of YAML configurations and their validation.

    preset or file ──base: chain──▶ merged keys ──key=value overrides──▶ schema of the stage ──▶ configuration

An error names the invalid key, the file or override that sets it, and the most similar valid name.
"""

from __future__ import annotations

import copy
import difflib
import posixpath
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bsq_ray import storage
from bsq_ray.config.token_models import MaskedLMConfig, PriorConfig
from bsq_ray.config.tokenizer_config import BSQConfig, FSQConfig, LFQConfig, TokenizerConfig, VQConfig
from bsq_ray.runtime.wrong_files import describe_wrong_file

AnyConfig = TokenizerConfig | MaskedLMConfig | PriorConfig
ConfigT = TypeVar("ConfigT", bound=BaseModel)

RawConfig = dict[str, Any]
KeyPath = tuple[str, ...]
Origins = dict[KeyPath, str]

STAGE_CONFIGS: dict[str, type[AnyConfig]] = {
    "tokenizer": TokenizerConfig,
    "masked-lm": MaskedLMConfig,
    "prior": PriorConfig,
}
_QUANTIZER_CONFIGS: dict[str, type[BaseModel]] = {"bsq": BSQConfig, "lfq": LFQConfig, "fsq": FSQConfig, "vq": VQConfig}
# A section keeps its other keys if `kind` changes within one of these sets; None: not given.
_KINDS_SHARING_KEYS = ({None, "bsq", "lfq"}, {None, "deepspeed", "ddp"}, {None, "adamw", "muon"})


def preset_names() -> list[str]:
    """Return the sorted names of the shipped presets."""
    files = (resources.files("bsq_ray") / "presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> AnyConfig:
    """Load a preset by name, or a YAML file by path or URL, and apply `key.path=value` overrides.

    A file may name another preset or file as its `base`; sections are merged key by key. A quantizer of another `kind`
    with other keys replaces the whole section.

    Raises:
        ValueError: an unknown preset, file, key or value; the message names the key, its origin and the valid values.
    """
    raw_config, origins = _read_with_base(source, base_chain=())
    # A change of kind may drop keys, so it comes before the overrides that set keys of the new kind.
    for path, value, label in sorted(map(_parse_override, overrides), key=lambda override: override[0][-1] != "kind"):
        _assign(raw_config, path, value, label)
        origins[path] = label
    return _validate_stage(raw_config, origins, source)


def parse_config(text: str, source: str) -> AnyConfig:
    """Parse and validate YAML text, for example the configuration stored in a model folder.

    Raises:
        ValueError: as `load_config`; `source` is the origin in the message.
    """
    return _validate_stage(_parse_mapping(text, source), {}, source)


def validate_mapping(raw_config: RawConfig, overrides: Sequence[str], schema: type[ConfigT], source: str) -> ConfigT:
    """Validate keys against any schema, such as the service's, with overrides as in `load_config`.

    Raises:
        ValueError: as `load_config`; `source` is the origin in the message.
    """
    raw_config, origins = copy.deepcopy(raw_config), {}
    for path, value, label in map(_parse_override, overrides):
        _assign(raw_config, path, value, label)
        origins[path] = label
    return _validate(raw_config, origins, source, schema)


def load_yaml_as(source: str, schema: type[ConfigT]) -> ConfigT:
    """Load a YAML file and validate it against any schema, such as a sweep's.

    Raises:
        ValueError: as `load_config`.
    """
    return _validate(_parse_mapping(storage.read_text(source), source), {}, source, schema)


def list_config_keys(schema: type[BaseModel]) -> list[str]:
    """Return the sorted dotted names of all keys of a schema, including the keys of every kind of quantizer."""
    return sorted({key for key, _ in iterate_fields(schema)})


def iterate_fields(schema: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Iterate over the dotted name and the pydantic field of every key, in the order of the schema.

    A key that several kinds of quantizer have appears once, with the field of the first kind.
    """
    previous_keys: set[str] = set()
    for path, field in _schema_fields(schema):
        key = ".".join(path)
        if key not in previous_keys:
            previous_keys.add(key)
            yield key, field


def dump_config(config: AnyConfig) -> str:
    """Return the configuration as YAML with every key, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by dotted key, each key with the prefix."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _read_with_base(source: str, base_chain: KeyPath) -> tuple[RawConfig, Origins]:
    """Return the keys of a file merged over those of its `base`, and the origin of each key."""
    if source in base_chain:
        raise ValueError(f"{source}: the chain of base files is circular ({' → '.join((*base_chain, source))})")
    text, label = _read_source(source)
    raw_config = _parse_mapping(text, label)
    base = raw_config.pop("base", None)
    origins: Origins = dict.fromkeys(_leaf_paths(raw_config), label)
    if base is None:
        return raw_config, origins
    if not isinstance(base, str):
        raise ValueError(f"{label}: base must be the name of a preset or a file, got {base!r}")
    base_config, base_origins = _read_with_base(resolve_relative_base(base, source), (*base_chain, source))
    return _merge(base_config, raw_config), base_origins | origins


def _read_source(source: str) -> tuple[str, str]:
    """Return the text of a preset or file, and its name in messages."""
    if source in preset_names():
        return (resources.files("bsq_ray") / "presets" / f"{source}.yaml").read_text("utf-8"), f"preset {source}"
    if not _is_file(source):
        raise ValueError(f"unknown preset '{source}'; {suggest(source, preset_names(), 'presets')}")
    return storage.read_text(source), source


def _is_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source


def resolve_relative_base(base: str, source: str) -> str:
    """Resolve a relative path of a base against the file that names it."""
    if not _is_file(base) or storage.is_url(base) or posixpath.isabs(base):
        return base
    scheme, separator, path = source.partition("://") if storage.is_url(source) else ("", "", source)
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), base))


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that parses `1e-4` as a number, as YAML 1.2 does, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        previous_keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in previous_keys:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key}", problem_mark=key_node.start_mark)
            previous_keys.add(key)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from error


def _parse_mapping(text: str, label: str) -> RawConfig:
    if text.strip() and (description := describe_wrong_file(text.encode("utf-8", "surrogatepass"))):
        raise ValueError(f"{label} {description}")
    raw_config = _parse_yaml(text, label)
    if not isinstance(raw_config, dict):
        actual = "nothing" if raw_config is None else type(raw_config).__name__
        raise ValueError(f"{label}: expected keys and values, found {actual}")
    return raw_config


def _parse_override(override: str) -> tuple[KeyPath, Any, str]:
    label = f"override '{override}'"
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ValueError(f"{label} is malformed; write key.path=value")
    return tuple(path.strip().split(".")), _parse_yaml(text, label), label


def _leaf_paths(mapping: Mapping[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """Iterate over the paths of the values in nested sections."""
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaf_paths(value, (*path, str(key)))
        else:
            yield (*path, str(key))


def _merge(base: RawConfig, changes: RawConfig) -> RawConfig:
    """Merge `changes` over `base`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        base_value = merged.get(key)
        if (
            isinstance(base_value, dict)
            and isinstance(value, dict)
            and _can_keep_keys(base_value, value.get("kind", base_value.get("kind")))
        ):
            merged[key] = _merge(base_value, value)
        else:
            merged[key] = value
    return merged


def _assign(node: RawConfig, path: KeyPath, value: Any, label: str) -> None:
    *parents, leaf = path
    for depth, parent in enumerate(parents, 1):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"{label}: {'.'.join(path[:depth])} is a value, not a section")
    if leaf == "kind" and not _can_keep_keys(node, value):
        node.clear()
    node[leaf] = value


def _can_keep_keys(node: RawConfig, kind: Any) -> bool:
    """Return whether the other keys of a section stay valid if its kind becomes `kind`."""
    previous_kind = node.get("kind")
    return previous_kind == kind or any(previous_kind in kinds and kind in kinds for kinds in _KINDS_SHARING_KEYS)


def require_stage(config: BaseModel, config_type: type[ConfigT], source: str) -> ConfigT:
    """Return `config` if it has the type of the expected stage.

    Raises:
        ValueError: the configuration is of another stage; the message names `source`.
    """
    if not isinstance(config, config_type):
        stage = config_type.model_fields["stage"].default
        raise ValueError(f"{source} has stage '{getattr(config, 'stage', '?')}'; expected stage '{stage}'")
    return config


def _validate_stage(raw_config: RawConfig, origins: Origins, source: str) -> AnyConfig:
    stage = raw_config.get("stage", "tokenizer")
    if stage not in STAGE_CONFIGS:
        origin = origins.get(("stage",), source)
        raise ValueError(
            f"{origin}: stage: {stage!r} is not valid; {suggest(str(stage), STAGE_CONFIGS, 'valid values')}"
        )
    return _validate(raw_config, origins, source, STAGE_CONFIGS[stage])


def _validate(raw_config: RawConfig, origins: Origins, source: str, schema: type[ConfigT]) -> ConfigT:
    try:
        return schema.model_validate(raw_config)
    except ValidationError as failure:
        messages = (_format_validation_error(error, origins, source, schema) for error in failure.errors())
        raise ValueError("\n".join(messages)) from None


def _format_validation_error(error: Any, origins: Origins, source: str, schema: type[BaseModel]) -> str:
    """Format one validation error: origin, key, problem, valid values."""
    path = tuple(str(part) for part in error["loc"] if part not in _QUANTIZER_CONFIGS)
    key = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    origin = _find_origin(path, message, origins, source)
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {_suggest_key(path, error['loc'], schema)}"
    if error["type"] == "union_tag_invalid":
        return f"{origin}: {key}.kind: {suggest(str(error['input']['kind']), _QUANTIZER_CONFIGS, 'valid values')}"
    if error["type"] == "literal_error":
        values = re.findall(r"'([^']*)'", error["ctx"]["expected"]) or [error["ctx"]["expected"]]
        return (
            f"{origin}: {key}: {error['input']!r} is not valid; {suggest(str(error['input']), values, 'valid values')}"
        )
    input_text = "" if isinstance(error["input"], dict | BaseModel) else f", got {error['input']!r}"
    return f"{origin}: {key + ': ' if key else ''}{message}{input_text}"


def _find_origin(path: KeyPath, message: str, origins: Origins, source: str) -> str:
    """Return the origin of the key at `path`; for a section, the origin of the last key that the message names."""
    exact_origins = [origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins]
    origins_below = {key: origin for key, origin in origins.items() if key[: len(path)] == path}
    mentioned_origins = [
        origin for key, origin in origins_below.items() if re.search(rf"\b{re.escape(key[-1])}\b", message)
    ]
    other_origins = list(origins_below.values()) if path else []
    return (exact_origins or mentioned_origins[::-1] or other_origins[::-1] or [source])[0]


def suggest(name: str, valid: Iterable[str], noun: str) -> str:
    """Suggest the valid name that is most similar to `name`, or list all of them."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"{noun} are {', '.join(valid)}"


def _suggest_key(path: KeyPath, loc: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """Suggest the most similar key of the section, else a key of this name elsewhere, else list the section's keys."""
    model_type = schema
    for part in loc[:-1]:
        model_type = _QUANTIZER_CONFIGS.get(str(part)) or _nested_model(model_type, str(part)) or model_type
    matches = difflib.get_close_matches(path[-1], model_type.model_fields, n=1, cutoff=0.6)
    elsewhere = [
        key for key, _ in iterate_fields(schema) if key.rpartition(".")[2] == path[-1] and key != ".".join(path)
    ]
    if matches:
        return f"did you mean {'.'.join((*path[:-1], matches[0]))}?"
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"valid keys are {', '.join(model_type.model_fields)}"


def _nested_model(model_type: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model_type.model_fields.get(name)
    annotation: Any = field.annotation if field else None
    if typing.get_origin(annotation) is dict:
        annotation = typing.get_args(annotation)[1]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _schema_fields(model_type: type[BaseModel], path: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Iterate over the paths and fields of all keys below a section."""
    for name, field in model_type.model_fields.items():
        yield (*path, name), field
        nested_types = list(_QUANTIZER_CONFIGS.values()) if name == "quantizer" else [_nested_model(model_type, name)]
        for nested_type in nested_types:
            if nested_type is not None:
                yield from _schema_fields(nested_type, (*path, name))
