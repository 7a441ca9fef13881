"""A run's newest figures for Prometheus, at the endpoint that Ray keeps open on every machine."""

from __future__ import annotations

import re
from typing import Any


class Gauges:
    """Gauges called `ray_bsq_{kind}_{name}`, such as `ray_bsq_training_loss`, with the run's folder as their label.

    Args:
        run: folder of the run.
    """

    def __init__(self, out_url: str) -> None:
        self._out_url = out_url
        self._gauges: dict[str, Any] = {}

    def update(self, record: dict[str, Any]) -> None:
        """Sets the gauges of a record's numbers."""
        from ray.util.metrics import Gauge

        for name, value in record.items():
            if not isinstance(value, int | float):
                continue
            metric_name = re.sub(r"\W", "_", f"bsq_{record['kind']}_{name}")
            if metric_name not in self._gauges:
                self._gauges[metric_name] = Gauge(
                    metric_name, f"{name} of the newest {record['kind']} record", tag_keys=("run",)
                )
            self._gauges[metric_name].set(value, {"run": self._out_url})
