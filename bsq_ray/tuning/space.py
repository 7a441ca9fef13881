"""The values that a sweep tries, and how a choice of them becomes a preset.

space ─distribution─▶ searcher ─sampled values─▶ changes: key → value ─▶ preset: a base and what differs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import model_validator

from bsq_ray.config.tokenizer_config import Strict

Changes = dict[str, Any]


class Parameter(Strict):
    """What one key of the configuration can be, or several that go together.

    Attributes:
        values: these, one after the other.
        choices: sets of keys by a name of their own, for keys that only make sense together.
        integers: [lowest, highest], both included.
        uniform, loguniform: [lowest, highest] real numbers, evenly or evenly in their logarithm.
    """

    values: list[Any] | None = None
    choices: dict[str, dict[str, Any]] | None = None
    integers: tuple[int, int] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of values, choices, integers, uniform, loguniform (there are {len(given)})")
        [(name, value)] = given.items()
        if not value:
            raise ValueError(f"{name} is empty")
        if name in ("integers", "uniform", "loguniform") and not value[0] < value[1]:
            raise ValueError(f"{name} {list(value)} is not a range [lowest, highest]")
        if name == "loguniform" and value[0] <= 0:
            raise ValueError(f"loguniform {list(value)} has no logarithm; its lowest value must be above 0")
        if self.values and len(set(map(_label, self.values))) < len(self.values):
            raise ValueError(f"values {self.values} names one twice")
        return self

    def listed(self) -> list[Any]:
        """All values a searcher can draw, as it sees them; none for a range of real numbers."""
        if self.integers:
            return list(range(self.integers[0], self.integers[1] + 1))
        return list(self.choices) if self.choices else [_label(value) for value in self.values or []]

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.integers:
            return IntDistribution(*self.integers)
        if self.uniform:
            return FloatDistribution(*self.uniform)
        if self.loguniform:
            return FloatDistribution(*self.loguniform, log=True)
        return CategoricalDistribution(self.listed())

    def changes(self, key: str, drawn: Any) -> Changes:
        """The keys of the configuration that a drawn value stands for."""
        if self.choices:
            return dict(self.choices[drawn])
        if self.values:
            return {key: next(value for value in self.values if _label(value) == drawn)}
        return {key: drawn}

    def named(self, key: str) -> Iterator[str]:
        """Dotted names of all keys it sets, when it stands in the space under `key`."""
        for drawn in self.listed() or [0.0]:
            yield from leaves(self.changes(key, drawn))


def _label(value: Any) -> Any:
    """Optuna's categories are plain values; anything else is named by its JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def leaves(changes: Mapping[str, Any]) -> Iterator[str]:
    """Dotted names of the single keys in changes whose values may be sections."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{key}.{below}" for below in leaves(value))
        else:
            yield key


def preset_text(base: str, name: str, description: str, changes: Changes, comments: list[str]) -> str:
    """A preset's YAML: its base, its name and the keys in which it differs."""
    keys: dict[str, Any] = {"base": base, "name": name, "description": description}
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = keys
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = {**section[last], **value} if isinstance(section.get(last), dict) else value
    lines = [f"# {comment}" for comment in comments]
    return "\n".join([*lines, yaml.safe_dump(keys, sort_keys=False)])
