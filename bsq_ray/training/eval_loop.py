"""Evaluations and sample images along a run.

evenly spaced held-out samples ─every W-th─▶ worker ─▶ stage.evaluate ─▶ sums ─all-reduce─▶ metrics
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from bsq_ray import model_folder
from bsq_ray.data.data_source import Batch, DataSource
from bsq_ray.data.factory import build_source
from bsq_ray.data.stream import SkippedSamples, evaluation_batches, evaluation_share
from bsq_ray.training.measurement import Measurement, Split, sample_unit
from bsq_ray.training.run_recorder import RunRecorder
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.stages.stage import Engines, MetricSum, Stage
from bsq_ray.training.worker_context import WorkerContext

_NUM_SAMPLE_IMAGES = 8


class EvalLoop:
    """Evaluates a stage on the same `training.eval_samples` samples each time, for any number of workers.

    The samples are distributed over the workers by index, and one all-reduce adds up their sums.

    Args:
        spec: the run; its training samples are used if it has no held-out ones.
        source: training samples.
        micro_batch: samples per batch.
        autocast: context of the forward passes.
        precision: name of their precision, for the record.
    """

    def __init__(
        self,
        spec: RunSpec,
        stage: Stage,
        *,
        engines: Engines,
        source: DataSource,
        micro_batch: int,
        autocast: torch.autocast,
        precision: str,
        recorder: RunRecorder,
        worker: WorkerContext,
    ) -> None:
        self._spec, self._stage, self._engines, self._train_source = spec, stage, engines, source
        self._micro_batch, self._autocast, self._precision = micro_batch, autocast, precision
        self._recorder, self._worker = recorder, worker

    def evaluate(self, weights: model_folder.WeightsKind) -> Measurement:
        """Record the metrics over the held-out samples and a sample image; collective.

        Args:
            weights: kind of the weights that are being evaluated, for the record.

        Raises:
            ValueError: no held-out sample can be read.
        """
        split: Split = "held_out" if self._spec.held_out_url else "train"
        source = self._source()
        skipped = SkippedSamples(source.num_samples)
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        num_samples, sample_image = 0, None
        with self._evaluation_context():
            for batch in self._share(source, skipped):
                # Without samples the batch is a placeholder, because forward passes of sharded engines are collective.
                is_counted = bool(batch.keys[0])
                num_samples += len(batch.keys) * is_counted
                batch_metrics, pixels_3HW = self._stage.evaluate(batch, self._engines)
                sample_image = pixels_3HW if sample_image is None else sample_image
                for name, metric in batch_metrics.items():
                    if not isinstance(metric, MetricSum):
                        metric = MetricSum(metric * len(batch.keys), len(batch.keys))
                    totals[name][0] += metric.total * is_counted
                    totals[name][1] += metric.count * is_counted
        names = sorted(totals)
        flat = [value for name in names for value in totals[name]]
        # A ratio of means over workers is the ratio of sums.
        mean_samples, *means = self._worker.all_reduce_mean([num_samples, *flat])
        num_samples = round(mean_samples * self._worker.world_size)
        if not num_samples:
            reason = f": {skipped.samples[-1]}" if skipped.samples else ""
            raise ValueError(f"{source.url} has no readable image to evaluate on{reason}")
        for text in skipped.retries:
            self._recorder.warn(text)
        metrics = {
            f"{split}/{name}": total / count for name, total, count in zip(names, means[::2], means[1::2], strict=True)
        }
        unit = sample_unit(self._spec.config)
        self._recorder.record(
            kind="evaluation",
            weights=weights,
            split=split,
            data=source.url,
            data_hash=source.hash,
            samples=num_samples,
            unit=unit,
            precision=self._precision,
            **metrics,
        )
        self._recorder.write_sample_image(sample_image)
        return Measurement(metrics, split, source.url, source.hash, num_samples, unit, self._precision, weights)

    def log_samples(self) -> None:
        """Record a sample image of the first held-out samples; collective."""
        source = self._source()
        limit = source.num_samples
        with self._evaluation_context():
            for batch in evaluation_batches(source, _NUM_SAMPLE_IMAGES, limit, SkippedSamples(limit)):
                _, pixels_3HW = self._stage.evaluate(batch, self._engines)
                self._recorder.write_sample_image(pixels_3HW)
                return

    @contextmanager
    def _evaluation_context(self) -> Iterator[None]:
        with evaluation_mode(self._stage.modules.values()), self._autocast:
            yield

    def _source(self) -> DataSource:
        held_out_url = self._spec.held_out_url
        source = build_source(self._spec.config, held_out_url) if held_out_url else self._train_source
        return source.evaluated

    def _share(self, source: DataSource, skipped: SkippedSamples) -> Iterator[Batch]:
        """Yield this worker's batches; every worker gets the same number, and empty ones as a placeholder."""
        rank, world_size = self._worker.rank, self._worker.world_size
        limit = self._spec.config.training.eval_samples
        for block in evaluation_share(source, self._micro_batch, limit, rank, world_size):
            skipped.retries.extend(block.retries)
            skipped.add(block.skipped)
            if block.keys:
                yield Batch(torch.from_numpy(block.values_P), torch.from_numpy(block.labels_P), block.keys)
            else:
                zeros = np.zeros((1, *block.values_P.shape[1:]), np.uint8)
                yield Batch(torch.from_numpy(zeros), torch.zeros(1, dtype=torch.int64), [""])


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch modules to evaluation mode within the context, and restore their mode and the random state afterwards.

    Dropout is off inside. What follows draws the random numbers it would draw without the evaluation.
    """
    # Each part has its own mode: frozen parts of a module in training stay in evaluation mode.
    modules = [part for module in modules for part in module.modules()]
    was_training = [module.training for module in modules]
    gpus = {parameter.device for module in modules for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(gpus, device_type="cuda"):
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, was_training, strict=True):
                module.training = mode
