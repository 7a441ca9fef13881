"""Sinks for the metrics of a run: `metrics.jsonl` and experiment trackers.

record ─▶ MetricsLog ─▶ JsonLinesSink, or SegmentedLogSink on object stores (always)
                     └▶ TensorBoardSink, MLflowSink, WandbSink (training.trackers)
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bsq_ray import config, storage
from bsq_ray.config.loader import flatten
from bsq_ray.runtime.daemon_thread import BackgroundUpload
from bsq_ray.training.monitoring.metrics_file import read_later_segments, read_metrics_file, segment_url
from bsq_ray.training.monitoring.segmented_log import SEGMENT_BYTES

# Python packages of trackers that are not dependencies of bsq_ray.
_OPTIONAL_PACKAGES = {"mlflow": "mlflow", "wandb": "wandb"}


class MetricsSink(Protocol):
    """Destination of metrics records; only rank 0 has sinks."""

    def write(self, record: dict[str, Any]) -> None:
        """Log a record with `kind`, `step` and JSON values; it may be buffered until `flush`."""

    def flush(self) -> None:
        """Write all buffered records to their destination, or start a thread that does.

        Raises:
            StorageUnavailableError: storage is, or was at the last call, unavailable; the data is kept.
        """

    def close(self) -> None:
        """Flush and release all resources."""


def check_trackers(trackers: Sequence[str]) -> None:
    """Check that the packages of all trackers are installed.

    Raises:
        ValueError: a package is missing; the message names it and the extra that installs it.
    """
    for tracker in trackers:
        package = _OPTIONAL_PACKAGES.get(tracker)
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"training.trackers contains {tracker}, but the package {package} is not installed; install "
                f'"bsq-ray[trackers]", or remove {tracker} from training.trackers'
            )


def build_tracker(name: str, out_url: str, last_step: int, run_config: config.AnyConfig | None) -> MetricsSink:
    """Return the sink of a tracker.

    Args:
        name: one of `training.trackers`.
        last_step: last completed step of a resumed run; 0 for a new run.
        run_config: logged as the hyperparameters of the run; None logs none.
    """
    values = flatten(run_config.model_dump(mode="json")) if run_config is not None else {}
    parameters = {key: str(value) for key, value in values.items()}
    if name == "tensorboard":
        return TensorBoardSink(out_url, last_step)
    return MLflowSink(out_url, parameters) if name == "mlflow" else WandbSink(out_url, parameters)


class JsonLinesSink:
    """Appends records to a local `metrics.jsonl`; drops records after `last_step`, written by an interrupted run.

    Segments of a log that was copied from an object store become part of the file.

    Attributes:
        warning: message about damaged lines of the existing file, which are dropped; empty without any.
    """

    def __init__(self, out_url: str, last_step: int) -> None:
        self._url = segment_url(out_url, 0)
        previous = read_metrics_file(self._url)
        self.warning = previous.warning
        lines = [f"{json.dumps(record)}\n" for record in previous.records if record["step"] <= last_step]
        self._pending_lines: list[str] = []
        storage.write_text(self._url, "".join(lines))
        for url in read_later_segments(out_url):
            storage.remove(url)

    def write(self, record: dict[str, Any]) -> None:
        """Log a record.

        Raises:
            StorageUnavailableError: storage is unavailable; the record is kept for the next call.
        """
        self._pending_lines.append(f"{json.dumps(record)}\n")
        self.flush()

    def flush(self) -> None:
        """Write all records; see `MetricsSink.flush`."""
        data = "".join(self._pending_lines).encode()
        with storage.translate_errors(self._url, "write"), open(storage.filesystem(self._url)[1], "ab", 0) as file:
            end = file.tell()
            if file.write(data) < len(data):
                # Undo the partial write, so that no line is truncated.
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending_lines.clear()

    def close(self) -> None:
        """Write all records."""
        self.flush()


class TensorBoardSink:
    """Writes scalars to `tensorboard/` under "kind/name"; a thread copies the file until it is full.

    Args:
        out_url: folder of the run.
        last_step: last completed step of a resumed run; 0 for a new run.
        segment_bytes: size at which the next file is opened.
    """

    def __init__(self, out_url: str, last_step: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._out_url, self._last_step, self._segment_bytes = out_url, last_step, segment_bytes
        # Write to a local folder and copy from there: on a full disk the writer's thread exits and later calls block.
        self._temp_dir = tempfile.TemporaryDirectory()
        self._num_full, self._uploaded_bytes = 0, 0
        self._writer = self._open_file()
        self._background = BackgroundUpload(self._upload, "tensorboard")

    def write(self, record: dict[str, Any]) -> None:
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()
        if sum(path.stat().st_size for path in self._folder(self._num_full).iterdir()) >= self._segment_bytes:
            # Closing waits for the writer's queue.
            self._writer.close()
            self._num_full += 1
            self._writer = self._open_file()
        self._background.start()

    def close(self) -> None:
        self._writer.close()
        self._background.finish()
        self._temp_dir.cleanup()

    def _folder(self, number: int) -> Path:
        return Path(self._temp_dir.name) / f"{number:06d}"

    def _open_file(self) -> Any:
        from tensorboardX import SummaryWriter

        # Step and number are part of the name, so that no file of the same second is overwritten.
        return SummaryWriter(
            str(self._folder(self._num_full)),
            purge_step=self._last_step + 1 if self._last_step and not self._num_full else None,
            filename_suffix=f".step-{self._last_step:07d}-{self._num_full:06d}",
        )

    def _upload(self) -> None:
        """Copy the open file, unless it has not grown, and for the last time those that are full."""
        num_full = self._num_full
        for path in sorted(Path(self._temp_dir.name).glob("*/*")):
            size = path.stat().st_size
            if size > self._uploaded_bytes:
                storage.upload(str(path), storage.join(self._out_url, "tensorboard", path.name))
                self._uploaded_bytes = size
            if int(path.parent.name) < num_full:
                shutil.rmtree(path.parent)
                self._uploaded_bytes = 0


class MLflowSink:
    """Logs scalars to an MLflow run; a resumed run continues the same MLflow run.

    MLflow reads `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` (default "bsq_ray") from the environment.
    """

    _TAG = "bsq_ray.out"

    def __init__(self, out_url: str, parameters: dict[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric_type = MlflowClient(), Metric
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bsq_ray")
        experiment = self._client.get_experiment_by_name(experiment_name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
        quoted_url = out_url.replace("'", "")
        runs = self._client.search_runs([experiment_id], f"tags.`{self._TAG}` = '{quoted_url}'", max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            return
        run_name = out_url.rstrip("/").rpartition("/")[2]
        self._run_id = self._client.create_run(
            experiment_id, tags={self._TAG: quoted_url}, run_name=run_name
        ).info.run_id
        params = [Param(name, value[:500]) for name, value in parameters.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def write(self, record: dict[str, Any]) -> None:
        timestamp_ms = int(time.time() * 1000)
        metrics = [
            self._metric_type(name, float(value), timestamp_ms, record["step"])
            for name, value in scalars_of(record).items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class WandbSink:
    """Logs scalars to a Weights & Biases run; a resumed run continues the same W&B run.

    W&B reads `WANDB_PROJECT` (default "bsq_ray"), `WANDB_MODE` and the API key from the environment.
    """

    def __init__(self, out_url: str, parameters: dict[str, str]) -> None:
        import wandb

        self._temp_dir = tempfile.TemporaryDirectory()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bsq_ray"),
            id=hashlib.sha256(out_url.encode("utf-8", "surrogateescape")).hexdigest()[:16],
            name=out_url.rstrip("/").rpartition("/")[2],
            resume="allow",
            config=parameters,
            # Keep offline runs in the run folder, from which `wandb sync` uploads them.
            dir=os.environ.get("WANDB_DIR") or (out_url if storage.is_local(out_url) else self._temp_dir.name),
        )
        # Records of several kinds share a step, and W&B rejects steps that decrease after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: dict[str, Any]) -> None:
        scalars = scalars_of(record)
        if scalars:
            self._run.log({**scalars, "step": record["step"]})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
        self._temp_dir.cleanup()


def scalars_of(record: dict[str, Any]) -> dict[str, int | float]:
    """Return the numeric values of a record except its step, by "kind/name"."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name != "step"
    }
