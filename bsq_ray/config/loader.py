"""From YAML to a checked configuration.

    preset or file ──base: chain──▶ merged keys ──key=value overrides──▶ schema of the stage ──▶ configuration

What the schema does not accept is reported with the key, the file or override it stands in, and the nearest valid name.
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

from bsq_ray import storage
from bsq_ray.config.token_models import MaskedLMConfig, PriorConfig
from bsq_ray.config.tokenizer_config import BSQ, FSQ, LFQ, VQ, TokenizerConfig

AnyConfig = TokenizerConfig | MaskedLMConfig | PriorConfig
Config = TypeVar("Config", bound=BaseModel)

Keys = dict[str, Any]
Path = tuple[str, ...]
Origins = dict[Path, str]

STAGES: dict[str, type[AnyConfig]] = {
    "tokenizer": TokenizerConfig,
    "masked-lm": MaskedLMConfig,
    "prior": PriorConfig,
}
_QUANTIZERS: dict[str, type[BaseModel]] = {"bsq": BSQ, "lfq": LFQ, "fsq": FSQ, "vq": VQ}
# Values of `kind` (None: not given) between which a section keeps its other keys.
_KINDS_OF_EQUAL_KEYS = ({None, "bsq", "lfq"}, {None, "deepspeed", "ddp"})


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    files = (resources.files("bsq_ray") / "presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> AnyConfig:
    """Reads a preset by name, or a YAML file by path or URL, and applies `key.path=value` overrides.

    A file may name another preset or file as its `base`: sections are merged key by key. Changing the `kind` of a
    quantizer to one that has other keys starts its section afresh.

    Raises:
        ValueError: an unknown preset, file, key or value; the message names the key, where it stands and what is valid.
    """
    keys, origins = _read(source, chain=())
    # A change of kind may drop keys, so it comes before the overrides that set keys of the new kind.
    for path, value, label in sorted(map(_parse_override, overrides), key=lambda override: override[0][-1] != "kind"):
        _assign(keys, path, value, label)
        origins[path] = label
    return _check(keys, origins, source)


def parse_config(text: str, source: str) -> AnyConfig:
    """Checks a configuration given as YAML text, for example the one stored in a model folder.

    Raises:
        ValueError: as `load_config`; `source` says where the text is from.
    """
    return _check(_parse_section(text, source), {}, source)


def check_section(keys: Keys, overrides: Sequence[str], schema: type[Config], source: str) -> Config:
    """Checks keys that belong to no stage, such as the settings of the service, with overrides as `load_config`.

    Raises:
        ValueError: as `load_config`; `source` says where the keys are from.
    """
    keys, origins = copy.deepcopy(keys), {}
    for path, value, label in map(_parse_override, overrides):
        _assign(keys, path, value, label)
        origins[path] = label
    return _validate(keys, origins, source, schema)


def read_section(source: str, schema: type[Config]) -> Config:
    """Reads a YAML file that is no configuration of a training, such as a sweep, as strictly as one.

    Raises:
        ValueError: as `load_config`.
    """
    return _validate(_parse_section(storage.read_text(source), source), {}, source, schema)


def known_keys(schema: type[BaseModel]) -> list[str]:
    """Dotted names of all keys of a schema and of its sections, those of every kind of quantiser too."""
    return sorted({".".join(path) for path in _schema_paths(schema)})


def dump_config(config: AnyConfig) -> str:
    """The whole configuration as YAML, every key written out, in the order of the schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(source: str, chain: Path) -> tuple[Keys, Origins]:
    """Keys of a file merged over those of its `base`, and which file each key came from."""
    if source in chain:
        raise ValueError(f"{source}: its base chain comes back to itself ({' → '.join((*chain, source))})")
    text, label = _open(source)
    keys = _parse_section(text, label)
    base = keys.pop("base", None)
    origins: Origins = dict.fromkeys(_leaves(keys), label)
    if base is None:
        return keys, origins
    if not isinstance(base, str):
        raise ValueError(f"{label}: base must be the name of a preset or a file, got {base!r}")
    base_keys, base_origins = _read(beside(base, source), (*chain, source))
    return _merge(base_keys, keys), base_origins | origins


def _open(source: str) -> tuple[str, str]:
    """The text of a preset or file, and what to call it in messages."""
    if source in preset_names():
        return (resources.files("bsq_ray") / "presets" / f"{source}.yaml").read_text("utf-8"), f"preset {source}"
    if not _is_file(source):
        raise ValueError(f"no preset is called '{source}'; {nearest(source, preset_names(), 'presets')}")
    return storage.read_text(source), source


def _is_file(source: str) -> bool:
    return source.endswith((".yaml", ".yml")) or "/" in source


def beside(base: str, source: str) -> str:
    """A base given as a relative path is relative to the file that names it."""
    if not _is_file(base) or "://" in base or posixpath.isabs(base):
        return base
    scheme, separator, path = source.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(posixpath.dirname(path), base))


class _Loader(yaml.SafeLoader):
    """Safe YAML where `1e-4` is a number, as in YAML 1.2, and a key may not be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from error


def _parse_section(text: str, label: str) -> Keys:
    keys = _parse_yaml(text, label)
    if not isinstance(keys, dict):
        found = "nothing" if keys is None else type(keys).__name__
        raise ValueError(f"{label}: expected keys and values, found {found}")
    return keys


def _parse_override(override: str) -> tuple[Path, Any, str]:
    label = f"override '{override}'"
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise ValueError(f"{label} is not of the form key.path=value")
    return tuple(path.strip().split(".")), _parse_yaml(text, label), label


def _leaves(keys: Mapping[str, Any], path: Path = ()) -> Iterator[Path]:
    """Paths of the values in nested sections."""
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key))


def _merge(base: Keys, changes: Keys) -> Keys:
    """`changes` over `base`, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _keep_keys(old, value.get("kind", old.get("kind"))):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _assign(keys: Keys, path: Path, value: Any, label: str) -> None:
    *sections, last = path
    for depth, section in enumerate(sections, 1):
        keys = keys.setdefault(section, {})
        if not isinstance(keys, dict):
            raise ValueError(f"{label}: {'.'.join(path[:depth])} is a value, not a section")
    if last == "kind" and not _keep_keys(keys, value):
        keys.clear()
    keys[last] = value


def _keep_keys(section: Keys, kind: Any) -> bool:
    """Whether a section's other keys stay valid when its kind becomes `kind`."""
    old = section.get("kind")
    return old == kind or any(old in kinds and kind in kinds for kinds in _KINDS_OF_EQUAL_KEYS)


def expect(run: BaseModel, kind: type[Config], source: str) -> Config:
    """A configuration of the wanted stage.

    Raises:
        ValueError: it is of another stage; the message names `source`.
    """
    if not isinstance(run, kind):
        stage = kind.model_fields["stage"].default
        raise ValueError(f"{source} is of the stage {getattr(run, 'stage', '?')}; what is wanted here is a {stage}")
    return run


def _check(keys: Keys, origins: Origins, source: str) -> AnyConfig:
    stage = keys.get("stage", "tokenizer")
    if stage not in STAGES:
        where = origins.get(("stage",), source)
        raise ValueError(f"{where}: stage: {stage!r} is not valid; {nearest(str(stage), STAGES, 'valid values')}")
    return _validate(keys, origins, source, STAGES[stage])


def _validate(keys: Keys, origins: Origins, source: str, schema: type[Config]) -> Config:
    try:
        return schema.model_validate(keys)
    except ValidationError as failure:
        told = (_explain(error, origins, source, schema) for error in failure.errors())
        raise ValueError("\n".join(told)) from None


def _explain(error: Any, origins: Origins, source: str, schema: type[BaseModel]) -> str:
    """One sentence: where the key stands, its name, what is wrong, and what would be right."""
    path = tuple(str(part) for part in error["loc"] if part not in _QUANTIZERS)
    key = ".".join(path)
    message = error["msg"].removeprefix("Value error, ")
    where = _origin(path, message, origins, source)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}; {_nearest_key(path, error['loc'], schema)}"
    if error["type"] == "union_tag_invalid":
        return f"{where}: {key}.kind: {nearest(str(error['input']['kind']), _QUANTIZERS, 'valid values')}"
    if error["type"] == "literal_error":
        values = re.findall(r"'([^']*)'", error["ctx"]["expected"]) or [error["ctx"]["expected"]]
        return (
            f"{where}: {key}: {error['input']!r} is not valid; {nearest(str(error['input']), values, 'valid values')}"
        )
    given = "" if isinstance(error["input"], dict | BaseModel) else f", got {error['input']!r}"
    return f"{where}: {key + ': ' if key else ''}{message}{given}"


def _origin(path: Path, message: str, origins: Origins, source: str) -> str:
    """What set the key at `path`; of a whole section, what set the last key that the message names."""
    exact = [origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins]
    section = {key: origin for key, origin in origins.items() if key[: len(path)] == path}
    named = [origin for key, origin in section.items() if re.search(rf"\b{re.escape(key[-1])}\b", message)]
    unnamed = list(section.values()) if path else []
    return (exact or named[::-1] or unnamed[::-1] or [source])[0]


def nearest(name: str, valid: Iterable[str], what: str) -> str:
    """What to tell somebody who wrote `name`: the most alike valid name, or all of them."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"{what} are {', '.join(valid)}"


def _nearest_key(path: Path, loc: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The most alike key of the same section, else a key of this name elsewhere, else all keys of the section."""
    section = schema
    for part in loc[:-1]:
        section = _QUANTIZERS.get(str(part)) or _subsection(section, str(part)) or section
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1, cutoff=0.6)
    elsewhere = [".".join(known) for known in _schema_paths(schema) if known[-1] == path[-1] and known != path]
    if near:
        return f"did you mean {'.'.join((*path[:-1], near[0]))}?"
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"valid keys are {', '.join(section.model_fields)}"


def _subsection(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = section.model_fields.get(name)
    annotation: Any = field.annotation if field else None
    if typing.get_origin(annotation) is dict:
        annotation = typing.get_args(annotation)[1]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _schema_paths(section: type[BaseModel], path: Path = ()) -> Iterator[Path]:
    """Paths of all keys below a section."""
    for name in section.model_fields:
        yield (*path, name)
        below = list(_QUANTIZERS.values()) if name == "quantizer" else [_subsection(section, name)]
        for part in below:
            if part is not None:
                yield from _schema_paths(part, (*path, name))
