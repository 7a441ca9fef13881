"""Log of a run: `metrics.jsonl`, the configured trackers, and sample images. Written by rank 0."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from PIL import Image
from torch import Tensor

from bsq_ray import config, storage
from bsq_ray.training.monitoring.background_sink import BackgroundSink
from bsq_ray.training.monitoring.metrics_file import LOG_FILE
from bsq_ray.training.monitoring.metrics_sinks import JsonLinesSink, MetricsSink, build_tracker
from bsq_ray.training.monitoring.segmented_log import SegmentedLogSink

# Segments on object stores and files of TensorBoard are written again, so not at every record.
_FLUSH_INTERVAL_S = 30.0
_NETWORK_TRACKERS = ("mlflow", "wandb")


class MetricsLog:
    """Distributes records to the sinks of a run.

    A sink that raises is dropped with one warning and never ends the run. While storage is unavailable, records are
    kept and written later. Trackers that send records over the network run in threads and never block the run.

    Args:
        out_url: folder of the run.
        last_step: step that the run resumes after; 0 for a new run.
        trackers: see `training.trackers`.
        run_config: recorded as the run's parameters.
        on_warning: receives the warnings.

    Raises:
        StorageUnavailableError: `metrics.jsonl` cannot be written.
    """

    def __init__(
        self,
        out_url: str,
        last_step: int,
        *,
        trackers: Sequence[str] = ("tensorboard",),
        run_config: config.AnyConfig | None = None,
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._out_url, self._on_warning = out_url, on_warning
        self._last_flush = 0.0
        self._sinks: dict[str, MetricsSink] = {}
        for name in (LOG_FILE, *trackers):
            try:
                self._sinks[name] = self._build_sink(name, last_step, run_config)
            except storage.StorageUnavailableError:
                raise
            except Exception as error:
                on_warning(_dropped(name, error))

    def write(self, record: dict[str, Any]) -> None:
        """Write a record; its numbers reach the trackers as "kind/name"."""
        for name in list(self._sinks):
            # Storage that rejects the record now may accept it at the next call.
            with suppress(storage.StorageUnavailableError):
                self._call(name, lambda sink: sink.write(record))
        if time.monotonic() - self._last_flush > _FLUSH_INTERVAL_S:
            with suppress(storage.StorageUnavailableError):
                self.flush()

    def image(self, name: str, pixels_3HW: Tensor) -> None:
        """Write a uint8 image as `samples/{name}.png`.

        Raises:
            StorageUnavailableError: the image was not written.
        """
        png = io.BytesIO()
        Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy()).save(png, "PNG")
        storage.write_bytes(storage.join(self._out_url, "samples", f"{name}.png"), png.getvalue())

    def flush(self) -> None:
        """Make all records visible: at once on a local disk, in threads on an object store.

        Raises:
            StorageUnavailableError: storage is, or was at the last call, unavailable; the records are kept.
        """
        self._last_flush = time.monotonic()
        for name in list(self._sinks):
            self._call(name, lambda sink: sink.flush())

    def close(self) -> None:
        """Make all records visible and release the sinks.

        Raises:
            StorageUnavailableError: as `flush`; `close` can be called again.
        """
        # The log file last, so that it has the warnings about the trackers.
        for name in reversed(list(self._sinks)):
            self._call(name, lambda sink: sink.close())
            self._sinks.pop(name, None)

    def _build_sink(self, name: str, last_step: int, run_config: config.AnyConfig | None) -> MetricsSink:
        if name == LOG_FILE:
            sink_type = JsonLinesSink if storage.is_local(self._out_url) else SegmentedLogSink
            log_file = sink_type(self._out_url, last_step)
            if log_file.warning:
                self._on_warning(log_file.warning)
            return log_file
        if name in _NETWORK_TRACKERS:
            return BackgroundSink(lambda: build_tracker(name, self._out_url, last_step, run_config))
        return build_tracker(name, self._out_url, last_step, run_config)

    def _call(self, name: str, action: Callable[[MetricsSink], None]) -> None:
        """Call a sink; drop it with a warning if it raises.

        Raises:
            StorageUnavailableError: storage is unavailable; the sink keeps its records.
        """
        if name not in self._sinks:
            # A warning about another sink, which is itself a record, has dropped this one.
            return
        try:
            action(self._sinks[name])
        except storage.StorageUnavailableError:
            raise
        except Exception as error:
            # Removed first, because the warning is itself a record.
            del self._sinks[name]
            self._on_warning(_dropped(name, error))


def _dropped(name: str, error: Exception) -> str:
    return f"{name} receives no further records: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
