"""Means of scalars over steps and micro batches, summed on the device and read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor


class ScalarMeans:
    """Sums scalars without reading them; `pop` reads all means with one copy per device."""

    def __init__(self) -> None:
        # By names that are added together: their sums, fp64 in the order of the names, and the number of additions.
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = defaultdict(int)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Add one value of each scalar; each is detached and has one element."""
        by_device: dict[torch.device, list[str]] = defaultdict(list)
        for name, value in scalars.items():
            by_device[value.device].append(name)
        for names in map(tuple, by_device.values()):
            values = torch.stack([scalars[name] for name in names])
            if names in self._sums:
                self._sums[names] += values
            else:
                self._sums[names] = values.double()
            self._counts[names] += 1

    def pop(self) -> dict[str, float]:
        """Return the mean of each scalar since the last call, by name in alphabetical order, and reset."""
        totals: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        by_device: dict[torch.device, list[tuple[str, ...]]] = defaultdict(list)
        for names, sums in self._sums.items():
            by_device[sums.device].append(names)
        for groups in by_device.values():
            flat_sums = torch.cat([self._sums[names] for names in groups]).tolist()
            flat_names = [(name, self._counts[names]) for names in groups for name in names]
            for (name, count), total in zip(flat_names, flat_sums, strict=True):
                totals[name] += total
                counts[name] += count
        self._sums.clear()
        self._counts.clear()
        return {name: totals[name] / counts[name] for name in sorted(totals)}
