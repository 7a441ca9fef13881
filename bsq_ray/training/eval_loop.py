"""Evaluations and sample images along a run.

held-out batches ─▶ stage.evaluate (evaluation mode, own random state) ─▶ mean metrics, sample image
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bsq_ray import model_folder
from bsq_ray.data.data_source import Batch, DataSource
from bsq_ray.data.factory import build_source
from bsq_ray.data.stream import SkippedSamples, evaluation_batches
from bsq_ray.training.run_recorder import RunRecorder
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.stages.stage import Engines, Stage


class EvalLoop:
    """Evaluates a stage on the same held-out samples each time.

    Every worker evaluates all of them, so that collective calls of the engines match.

    Args:
        spec: the run; its training samples are used if it has no held-out ones.
        source: training samples.
        micro_batch: samples per batch.
        autocast: context of the forward passes.
    """

    def __init__(
        self,
        spec: RunSpec,
        stage: Stage,
        engines: Engines,
        source: DataSource,
        micro_batch: int,
        autocast: torch.autocast,
        recorder: RunRecorder,
    ) -> None:
        self._spec, self._stage, self._engines, self._source = spec, stage, engines, source
        self._micro_batch, self._autocast, self._recorder = micro_batch, autocast, recorder

    def evaluate(self, weights: model_folder.WeightsKind) -> dict[str, float]:
        """Record the mean metrics over the held-out samples and a sample image; collective.

        Args:
            weights: kind of the weights that are being evaluated, for the record.

        Returns:
            The metrics by name.

        Raises:
            ValueError: no held-out sample can be read.
        """
        metric_sums: dict[str, float] = defaultdict(float)
        num_samples, sample_image = 0, None
        with self._evaluation_context():
            for batch in self._batches(self._spec.config.training.eval_batches):
                batch_metrics, pixels_3HW = self._stage.evaluate(batch, self._engines)
                sample_image = pixels_3HW if sample_image is None else sample_image
                num_samples += len(batch.keys)
                for name, value in batch_metrics.items():
                    metric_sums[name] += value * len(batch.keys)
        metrics = {name: value / num_samples for name, value in metric_sums.items()}
        self._recorder.record(kind="evaluation", weights=weights, images=num_samples, **metrics)
        self._recorder.write_sample_image(sample_image)
        return metrics

    def log_samples(self) -> None:
        """Record a sample image of the first held-out batch; collective."""
        with self._evaluation_context():
            for batch in self._batches(1):
                _, pixels_3HW = self._stage.evaluate(batch, self._engines)
                self._recorder.write_sample_image(pixels_3HW)

    @contextmanager
    def _evaluation_context(self) -> Iterator[None]:
        with evaluation_mode(self._stage.modules.values()), self._autocast:
            yield

    def _batches(self, num_batches: int) -> Iterator[Batch]:
        held_out_url = self._spec.held_out_url
        source = build_source(self._spec.config, held_out_url) if held_out_url else self._source
        limit = num_batches * self._micro_batch
        skipped, num_samples = SkippedSamples(limit), 0
        for batch in evaluation_batches(source, self._micro_batch, limit, skipped):
            num_samples += len(batch.keys)
            yield batch
        if not num_samples:
            raise ValueError(f"{source.url} has no readable image to evaluate on: {skipped.samples[-1]}")
        for text in skipped.retries:
            self._recorder.warn(text)


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch modules to evaluation mode within the context, and restore their mode and the random state afterwards.

    Dropout is off inside. What follows draws the random numbers it would draw without the evaluation.
    """
    modules = list(modules)
    was_training = [module.training for module in modules]
    gpus = {parameter.device for module in modules for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(gpus, device_type="cuda"):
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for module, mode in zip(modules, was_training, strict=True):
                module.train(mode)
