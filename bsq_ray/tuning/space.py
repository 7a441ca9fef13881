"""The values that a sweep tries, and how a choice of them becomes a preset.

space ─distribution─▶ searcher ─sampled values─▶ changes: key → value ─▶ preset: a base and what differs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import model_validator

from bsq_ray.config.tokenizer_config import StrictModel

Changes = dict[str, Any]


class SearchParameter(StrictModel):
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
    def _check_one_kind(self) -> SearchParameter:
        kinds = {name: value for name, value in self if value is not None}
        if len(kinds) != 1:
            raise ValueError(f"give one of values, choices, integers, uniform, loguniform (there are {len(kinds)})")
        [(name, value)] = kinds.items()
        if not value:
            raise ValueError(f"{name} is empty")
        if name in ("integers", "uniform", "loguniform") and not value[0] < value[1]:
            raise ValueError(f"{name} {list(value)} is not a range [lowest, highest]")
        if name == "loguniform" and value[0] <= 0:
            raise ValueError(f"loguniform {list(value)} has no logarithm; its lowest value must be above 0")
        if self.values and len(set(map(_category_label, self.values))) < len(self.values):
            raise ValueError(f"values {self.values} names one twice")
        return self

    def grid_values(self) -> list[Any]:
        """All values a searcher can draw, as it sees them; none for a range of real numbers."""
        if self.integers:
            return list(range(self.integers[0], self.integers[1] + 1))
        return list(self.choices) if self.choices else [_category_label(value) for value in self.values or []]

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.integers:
            return IntDistribution(*self.integers)
        if self.uniform:
            return FloatDistribution(*self.uniform)
        if self.loguniform:
            return FloatDistribution(*self.loguniform, log=True)
        return CategoricalDistribution(self.grid_values())

    def to_changes(self, key: str, choice: Any) -> Changes:
        """The keys of the configuration that a drawn value stands for."""
        if self.choices:
            return dict(self.choices[choice])
        if self.values:
            return {key: next(value for value in self.values if _category_label(value) == choice)}
        return {key: choice}

    def config_keys(self, key: str) -> Iterator[str]:
        """Dotted names of all keys it sets, when it stands in the space under `key`."""
        for choice in self.grid_values() or [0.0]:
            yield from leaf_keys(self.to_changes(key, choice))


def _category_label(value: Any) -> Any:
    """Optuna's categories are plain values; anything else is named by its JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def leaf_keys(changes: Mapping[str, Any]) -> Iterator[str]:
    """Dotted names of the single keys in changes whose values may be sections."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{key}.{child}" for child in leaf_keys(value))
        else:
            yield key


def preset_text(base: str, name: str, description: str, changes: Changes, comments: list[str]) -> str:
    """A preset's YAML: its base, its name and the keys in which it differs."""
    keys: dict[str, Any] = {"base": base, "name": name, "description": description}
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = keys
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = {**node[leaf], **value} if isinstance(node.get(leaf), dict) else value
    lines = [f"# {comment}" for comment in comments]
    return "\n".join([*lines, yaml.safe_dump(keys, sort_keys=False)])
