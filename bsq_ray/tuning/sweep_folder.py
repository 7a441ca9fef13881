"""Ownership of a sweep's folder: `sweep.yaml` in it states which sweep it contains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from bsq_ray import storage
from bsq_ray.tuning.sweep_config import SweepConfig

# Keys that may change when a sweep resumes.
_MUTABLE_KEYS = {"description", "budget"}
_FIXED_BUDGET_KEYS = ("steps", "minutes")


def claim_folder(sweep: SweepConfig, data_url: str, held_out_url: str, out_url: str, resume: bool) -> None:
    """Write `sweep.yaml` into the folder.

    Raises:
        ValueError: the folder contains another sweep, other files, or this sweep without `resume`.
    """
    url = storage.join(out_url, "sweep.yaml")
    current = {**sweep.model_dump(mode="json", exclude_none=True), "data": data_url, "held_out": held_out_url}
    if storage.exists(url):
        previous = _read_sweep_file(url)
        differing_keys = [
            key
            for key in sorted(previous.keys() | current.keys())
            if _fixed_value(previous, key) != _fixed_value(current, key)
        ]
        if differing_keys:
            raise ValueError(
                f"{out_url} contains another sweep ({', '.join(differing_keys)} differ); give the same values, "
                "or another --out"
            )
        if not resume:
            raise ValueError(f"{out_url} already contains this sweep; resume it with --resume, or choose another --out")
    elif storage.list_folder(out_url):
        raise ValueError(f"{out_url} is not empty and contains no sweep; choose another --out")
    storage.write_text(url, yaml.safe_dump(current, sort_keys=False))


def _read_sweep_file(url: str) -> dict[str, Any]:
    """Read the keys of the sweep that a folder contains.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = yaml.safe_load(storage.read_bytes(url))
    except yaml.YAMLError:
        values = None
    if isinstance(values, dict) and all(isinstance(values.get(key), dict) for key in ("budget", "metrics")):
        return values
    raise ValueError(f"{url} is damaged and does not identify its sweep; restore the file, or choose another --out")


def _fixed_value(values: Mapping[str, Any], key: str) -> Any:
    """Return the part of a key's value that cannot change when a sweep resumes."""
    if key == "budget":
        return {name: values.get(key, {}).get(name) for name in _FIXED_BUDGET_KEYS}
    if key == "metrics":
        # Order matters: the first metric decides which trial is the best.
        return list(values.get(key, {}).items())
    return None if key in _MUTABLE_KEYS else values.get(key)
