"""Compute reconstruction metrics per batch, and accumulate the results of many workers.

    images or clips ─tokenizer─▶ reconstructions ─▶ `BatchMetrics`: metrics, features ─▶ `MetricAccumulator`
                    ─mean colors─▶ baseline at the same bit rate, the second row of the results

A worker has no state between batches, so a lost worker is replaced without losing results. Metrics of images are in
`image_metrics.py`, those of clips in `clip_metrics.py`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bsq_ray.data.data_source import SampleBlock
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.evaluation.plots.comparison_grid import Comparison, subsample
from bsq_ray.evaluation.reconstruction.baseline import MeanColorCodec
from bsq_ray.metrics.fid import FeatureStatistics, sampling_ranks
from bsq_ray.model_folder import WeightsKind
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.quantizers.usage import CodeUsage
from bsq_ray.models.tokenizer import Tokenizer, Tokens
from bsq_ray.runtime.device import default_device
from bsq_ray.runtime.precision import enable_strict_fp32
from bsq_ray.runtime.random_streams import RandomStream, stream_rng

ROWS = ("model", "mean color")
# Approximate number of example images per evaluation, selected by a hash of the sample keys.
_MAX_EXAMPLES = 256


@dataclass
class BatchMetrics:
    """Metrics of a batch of N images or clips.

    Attributes:
        keys: keys of the samples.
        skipped: keys of the samples that could not be read.
        metrics: values (N,), or (N, T) per frame of clips, by row and metric name.
        features: features (N, D) of the originals (row "original") and of each row; empty if the samples have none.
        packed_bits: packed bits of the tokens, uint8 (N, tokens, bytes).
        comparisons: examples for the plots.
        seconds: duration of encoding and decoding.
    """

    keys: list[str]
    skipped: list[str]
    metrics: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    packed_bits: np.ndarray | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: float = 0.0


class ReconstructionMetrics(ABC):
    """Callable for Ray Data that reconstructs a batch with a tokenizer and with a baseline, and computes metrics.

    Args:
        model_url: model folder of a tokenizer.
        weights: weights of the folder to use, "ema" or "raw".
        num_samples: size of the data set; determines the fraction of samples returned as examples.
        bits_of_rows: further rows, by name: the number of bits of each token that is decoded.
        flip_rates: further rows, by name: the probability with which each bit is flipped before decoding.

    Attributes:
        networks: names of the metric networks.
    """

    networks: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        model_url: str,
        weights: WeightsKind,
        num_samples: int,
        bits_of_rows: Mapping[str, int] | None = None,
        flip_rates: Mapping[str, float] | None = None,
    ) -> None:
        enable_strict_fp32()
        self.device = default_device()
        self.tokenizer = Tokenizer.from_pretrained(model_url, weights).to(self.device)
        model_config = self.tokenizer.config
        self.baseline_codec = MeanColorCodec(model_config.patch_size, model_config.quantizer.bits)
        self.bits_of_rows, self.flip_rates = dict(bits_of_rows or {}), dict(flip_rates or {})
        self.example_fraction = min(1.0, _MAX_EXAMPLES / num_samples)
        self.load_feature_network()

    @abstractmethod
    def load_feature_network(self) -> None:
        """Load the network of `features` on the device; called once, when the tokenizer is loaded."""

    @abstractmethod
    def reconstruct_baseline(self, original: Tensor) -> Tensor:
        """Return the reconstructions of the baseline codec, in the same shape."""

    @abstractmethod
    def sample_metrics(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Return metrics by name: (B,) per sample, or (B, T) per frame."""

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor | None:
        """Return features (B, D) for the distribution metrics, or None if the samples have none."""

    @staticmethod
    @abstractmethod
    def distribution_metrics(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """Return distances between two feature distributions, by name."""

    def __call__(self, samples: SampleBlock) -> BatchMetrics:
        """Compute the metrics of one batch, on pixels rounded to 8 bits."""
        result = BatchMetrics(samples.keys, samples.skipped)
        if not samples.keys:
            return result
        original = to_float(torch.from_numpy(samples.values_P).to(self.device))
        decoded, tokens, result.seconds = self._reconstruct(original)
        result.packed_bits = pack_bits(tokens.bits_BNL).cpu().numpy()
        rows = dict(zip(ROWS, (decoded, self.reconstruct_baseline(original)), strict=True))
        for row, num_bits in self.bits_of_rows.items():
            rows[row] = self.tokenizer.decode_cut_bits(tokens.first(num_bits)).reshape(original.shape)
        for row, rate in self.flip_rates.items():
            rows[row] = self.tokenizer.decode(flip_bits(tokens, rate, samples.keys)).reshape(original.shape)
        rows = {row: to_float(to_uint8(values)) for row, values in rows.items()}
        for row, values in (rows | {"original": original}).items():
            features_BD = self.features(values)
            if features_BD is not None:
                result.features[row] = features_BD.cpu().numpy()
        for row, values in rows.items():
            sample_metrics = self.sample_metrics(original, values)
            result.metrics[row] = {name: value.double().cpu().numpy() for name, value in sample_metrics.items()}
        pixels = [to_uint8(values).cpu().numpy() for values in (original, *(rows[row] for row in ROWS))]
        result.comparisons = [
            Comparison(samples.keys[n], np.stack([row[n] for row in pixels]), *self._example_scores(result, n))
            for n in self._select_examples(result)
        ]
        return result

    def _reconstruct(self, original: Tensor) -> tuple[Tensor, Tokens, float]:
        """Return the reconstructions, the tokens and the duration in seconds."""
        start = time.perf_counter()
        tokens = self.tokenizer.encode(original)
        decoded = self.tokenizer.decode(tokens)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return decoded, tokens, time.perf_counter() - start

    def _example_scores(self, result: BatchMetrics, index: int) -> tuple[list[float], list[float]]:
        values = ([float(result.metrics[row][name][index].mean()) for row in ROWS] for name in ("lpips", "psnr"))
        return next(values), next(values)

    def _select_examples(self, result: BatchMetrics) -> list[int]:
        """Return the indices of the samples with the best and worst LPIPS, and of a subset selected by key."""
        score_B = lpips_per_sample(result)
        sampled = np.flatnonzero(sampling_ranks(result.keys) <= self.example_fraction * (2.0**64 - 1))
        return sorted({int(score_B.argmin()), int(score_B.argmax()), *sampled.tolist()})


def flip_bits(tokens: Tokens, rate: float, keys: Sequence[str]) -> Tokens:
    """Flip each bit with a probability; the flips depend on the key of the sample and on the rate alone.

    Bits that flip at a rate also flip at every higher one.
    """
    shape = tuple(tokens.bits_BNL.shape[1:])
    rngs = [stream_rng(RandomStream.EVALUATION_BIT_NOISE, key) for key in keys]
    flipped_BNL = torch.from_numpy(np.stack([rng.random(shape) < rate for rng in rngs]))
    return Tokens(tokens.bits_BNL ^ flipped_BNL.to(tokens.bits_BNL.device), tokens.grid)


def lpips_per_sample(batch: BatchMetrics) -> np.ndarray:
    """Return the LPIPS of the model's reconstruction of each sample, (N,)."""
    lpips = batch.metrics["model"]["lpips"]
    return lpips.reshape(len(lpips), -1).mean(1)


class MetricAccumulator:
    """Accumulates metrics over batches; per sample, it stores only one LPIPS value.

    Args:
        bits: number of bits per token (L).
        metrics_type: class that computed the batch metrics.
        further_rows: names of the rows besides `ROWS`, which stand between them.
    """

    def __init__(self, bits: int, metrics_type: type[ReconstructionMetrics], further_rows: Iterable[str] = ()) -> None:
        self.usage = CodeUsage(bits)
        self.skipped: list[str] = []
        self.comparisons: list[Comparison] = []
        self.lpips_scores: list[float] = []
        self.num_samples, self._seconds, self._bits, self._metrics_type = 0, 0.0, bits, metrics_type
        self._rows = (ROWS[0], *further_rows, *ROWS[1:])
        self._sums: dict[str, dict[str, np.ndarray]] = {row: {} for row in self._rows}
        self._features: dict[str, FeatureStatistics] = {}

    def update(self, part: BatchMetrics) -> None:
        """Add the metrics of a batch."""
        self.skipped += part.skipped
        if part.packed_bits is None:
            return
        for row, metrics in part.metrics.items():
            for name, value in metrics.items():
                self._sums[row][name] = self._sums[row].get(name, 0.0) + value.sum(0)
        for row, features_ND in part.features.items():
            self._features.setdefault(row, FeatureStatistics(features_ND.shape[1])).update(features_ND, part.keys)
        self.usage.update(unpack_bits(torch.from_numpy(part.packed_bits), self._bits))
        self.lpips_scores += lpips_per_sample(part).tolist()
        self.comparisons = subsample(self.comparisons + part.comparisons)
        self.num_samples += len(part.keys)
        self._seconds += part.seconds

    def merge(self, other: MetricAccumulator) -> None:
        """Add the metrics that another process accumulated from other batches."""
        self.skipped += other.skipped
        if not other.num_samples:
            return
        for row, sums in other._sums.items():
            for name, value in sums.items():
                self._sums[row][name] = self._sums[row].get(name, 0.0) + value
        for row, statistics in other._features.items():
            self._features.setdefault(row, FeatureStatistics(statistics.width)).merge(statistics)
        self.usage.set_counts(self.usage.counts() + other.usage.counts())
        self.lpips_scores += other.lpips_scores
        self.comparisons = subsample(self.comparisons + other.comparisons)
        self.num_samples += other.num_samples
        self._seconds += other._seconds

    def compute(self) -> dict[str, dict[str, float]]:
        """Return metrics by row and name; `samples_per_second` is the throughput of one worker."""
        metrics = {row: {name: float(value.mean()) for name, value in self._means(row).items()} for row in self._rows}
        if self._features:
            for row in self._rows:
                metrics[row] |= self._metrics_type.distribution_metrics(self._features["original"], self._features[row])
        metrics["model"] |= self.usage.compute() | {"samples_per_second": self.num_samples / self._seconds}
        return metrics

    def per_frame(self) -> dict[str, dict[str, list[float]]]:
        """Return the mean metrics at each frame index of clips, by row and name."""
        return {row: {name: v.tolist() for name, v in self._means(row).items() if v.ndim} for row in self._rows}

    def _means(self, row: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) / self.num_samples for name, value in self._sums[row].items()}
