"""Records of a run: every record goes to the log of the run and to the reporter of rank 0.

scalars of all steps since the last record ─▶ mean ─▶ all-reduce ─▶ rank 0: metrics log, reporter
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from bsq_ray import storage
from bsq_ray.data.stream import SkippedSamples
from bsq_ray.storage import Value
from bsq_ray.training.monitoring.metrics_log import MetricsLog
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.worker_context import WorkerContext


class RunRecorder:
    """Writes the records of a run; only rank 0 writes, the collective methods are called by every worker.

    Attributes:
        step: steps taken, which is part of every record.
    """

    def __init__(self, spec: RunSpec, worker: WorkerContext) -> None:
        self.step = 0
        self._spec, self._worker = spec, worker
        self._metrics_log: MetricsLog | None = None
        self._num_skips_recorded = 0

    def open(self) -> None:
        """Open the log of the run; records of later steps are dropped from it.

        Records written before go to the reporter alone.
        """
        if self._worker.is_main:
            trackers = self._spec.config.training.trackers
            self._metrics_log = self.retry(
                lambda: MetricsLog(
                    self._spec.out_url,
                    self.step,
                    trackers=trackers,
                    run_config=self._spec.config,
                    on_warning=self.warn,
                )
            )

    def close(self) -> None:
        """Make all records visible and close the log; a log that cannot be written does not fail the run."""
        if self._metrics_log:
            try:
                self.retry(self._metrics_log.close)
            except storage.StorageUnavailableError as error:
                self.warn(f"{error}; the last records are lost")

    def flush(self) -> None:
        """Make all records visible, unless storage is unavailable; then the next flush writes them."""
        if self._metrics_log:
            with suppress(storage.StorageUnavailableError):
                self._metrics_log.flush()

    def retry(self, operation: Callable[[], Value]) -> Value:
        """Return the result of a storage operation, which is retried with a warning while storage is unavailable."""
        return storage.retry_while_unavailable(operation, self._spec.config.training.storage_timeout_s, self.warn)

    def record(self, **record: Any) -> None:
        """Write one record; `kind` names its type."""
        if not self._worker.is_main:
            return
        record = {"kind": record.pop("kind"), "step": self.step, **record}
        if self._metrics_log:
            self._metrics_log.write(record)
        self._worker.reporter.record(record)

    def warn(self, text: str) -> None:
        """Write a warning."""
        self.record(kind="warning", text=text)

    def write_sample_image(self, pixels_3HW: Tensor | None) -> None:
        """Write a uint8 image as `samples/step-N.png`; if it cannot be written, skip it with a warning."""
        if self._metrics_log and pixels_3HW is not None:
            try:
                self._metrics_log.image(f"step-{self.step:07d}", pixels_3HW)
            except Exception as error:
                self.warn(f"{error}; the image is skipped")

    def record_training(self, scalar_means: dict[str, float], stage_metrics: dict[str, float], **fields: Any) -> None:
        """Write the mean scalars of all workers since the last training record; collective.

        Args:
            scalar_means: by name, this worker's mean since then.
            stage_metrics: by name, this worker's value; the mean over workers is recorded.
            fields: values that are equal on all workers.
        """
        means = self._worker.all_reduce_mean([*scalar_means.values(), *stage_metrics.values()])
        self.record(kind="training", **dict(zip([*scalar_means, *stage_metrics], means, strict=True)), **fields)

    def record_data_events(self, skipped: SkippedSamples) -> None:
        """Write what any worker skipped or retried since the last call; collective.

        Afterwards `skipped` contains the samples skipped by all workers, so that the limit applies to them together.

        Raises:
            RuntimeError: more samples were skipped than `data.max_skipped_samples`.
        """
        new_skips, retries = skipped.samples[self._num_skips_recorded :], skipped.retries
        [any_rank] = self._worker.all_reduce_max([float(len(new_skips) + len(retries))])
        if any_rank:
            events_by_rank = self._worker.all_gather_object((new_skips, retries))
            skipped_samples = list(dict.fromkeys(text for texts, _ in events_by_rank for text in texts))
            for text in (text for _, texts in events_by_rank for text in texts):
                self.warn(text)
            if skipped_samples:
                self.record(kind="skipped_samples", samples=skipped_samples)
            skipped.add(skipped_samples)
        self._num_skips_recorded = len(skipped.samples)
        skipped.retries.clear()
