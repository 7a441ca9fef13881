"""Newest metrics of a run for Prometheus, through the endpoint of Ray on every node."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

# Ray accepts only ASCII in labels.
_LABEL_CHARACTERS = "".join(character for character in string.printable if character not in "%\t\n\r\v\f")


class Gauges:
    """Gauges named `ray_bsq_{kind}_{name}`, such as `ray_bsq_training_loss`, with the run's folder as label `run`.

    Letters beyond ASCII are percent-encoded in the label. The first error ends the gauges, never the run.

    Args:
        out_url: folder of the run.
        on_warning: receives one warning if the gauges fail.
    """

    def __init__(self, out_url: str, on_warning: Callable[[str], None]) -> None:
        self._label = quote(out_url, _LABEL_CHARACTERS, errors="surrogateescape")
        self._on_warning = on_warning
        self._gauges: dict[str, Any] = {}
        self._is_active = True

    def update(self, record: dict[str, Any]) -> None:
        """Set the gauges of a record's numbers."""
        if not self._is_active:
            return
        try:
            self._set_gauges(record)
        except Exception as error:
            self._is_active = False
            self._on_warning(f"Prometheus receives no further records: {type(error).__name__}: {error}")

    def _set_gauges(self, record: dict[str, Any]) -> None:
        from ray.util.metrics import Gauge

        for name, value in record.items():
            if not isinstance(value, int | float):
                continue
            metric_name = re.sub(r"\W", "_", f"bsq_{record['kind']}_{name}")
            if metric_name not in self._gauges:
                self._gauges[metric_name] = Gauge(
                    metric_name, f"{name} of the newest {record['kind']} record", tag_keys=("run",)
                )
            self._gauges[metric_name].set(value, {"run": self._label})
