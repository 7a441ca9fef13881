"""Measuring reconstructions batch by batch: what a worker does, and how results of many workers become one.

    images or clips ─tokenizer─▶ reconstructions ─▶ `Measured`: figures and features of each sample ─▶ `Totals`
                    ─mean colours─▶ the trivial codec at the same bits, as a second row

A worker keeps nothing between batches, so a lost one is replaced without a trace. What images and clips differ in is in
`measure_images.py` and `measure_clips.py`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bsq_ray.data.data_source import SampleBlock
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.evaluation.plots.comparison_grid import Comparison, keep
from bsq_ray.evaluation.reconstruction.baseline import MeanColourCodec
from bsq_ray.metrics.fid import FeatureStatistics, sampling_ranks
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.quantizers.usage import CodeUsage
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.runtime.precision import strict_fp32

ROWS = ("model", "mean colour")
# Pictures that travel from the workers, of samples chosen by their keys.
_PICTURED = 256


@dataclass
class Measured:
    """What is known of a batch of N images or clips.

    Attributes:
        figures: values (N,), or of the frames of clips (N, T), by row and name of the metric.
        features: features (N, D) of the originals (row "original") and of each row, if there are any.
        packed: the tokens' bits, packed (N, tokens, bytes).
        comparisons: pictures of a few.
        seconds: for encoding and decoding.
        damaged: samples that could not be read.
    """

    keys: list[str]
    damaged: list[str]
    figures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    packed: np.ndarray | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: float = 0.0


class Measurer(ABC):
    """Reconstructs samples with a model folder's tokenizer and measures them.

    Args:
        total: samples of the whole data set, which decides how many pictures are taken.

    Attributes:
        networks: names of the metric networks it looks through.
    """

    networks: ClassVar[tuple[str, ...]]

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], total: int) -> None:
        strict_fp32()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = Tokenizer.from_pretrained(model_url, weights).to(self.device)
        section = self.tokenizer.config
        self.codec = MeanColourCodec(section.patch_size, section.quantizer.bits)
        self.pictured = min(1.0, _PICTURED / total)

    @abstractmethod
    def trivial(self, original: Tensor) -> Tensor:
        """What the trivial codec makes of them."""

    @abstractmethod
    def figures(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Metrics of each sample, (B,), or of each of its frames, (B, T)."""

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor | None:
        """Features (B, D) whose distribution is compared; None if the samples have none."""

    @staticmethod
    @abstractmethod
    def distances(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """Distances between two distributions of features, by name."""

    def __call__(self, samples: SampleBlock) -> Measured:
        """Measures one batch; pixels are rounded to 8 bits first."""
        result = Measured(samples.keys, samples.skipped)
        if not samples.keys:
            return result
        original = to_float(torch.from_numpy(samples.values_P).to(self.device))
        decoded, bits_BNL, result.seconds = self._reconstruct(original)
        result.packed = pack_bits(bits_BNL).cpu().numpy()
        rows = dict(zip(ROWS, (decoded, self.trivial(original)), strict=True))
        rows = {row: to_float(to_uint8(values)) for row, values in rows.items()}
        for row, values in (rows | {"original": original}).items():
            features_BD = self.features(values)
            if features_BD is not None:
                result.features[row] = features_BD.cpu().numpy()
        for row, values in rows.items():
            figures = self.figures(original, values)
            result.figures[row] = {name: value.double().cpu().numpy() for name, value in figures.items()}
        pixels = [to_uint8(values).cpu().numpy() for values in (original, *rows.values())]
        result.comparisons = [
            Comparison(samples.keys[n], np.stack([row[n] for row in pixels]), *self._captions(result, n))
            for n in self._pictured(result)
        ]
        return result

    def _reconstruct(self, original: Tensor) -> tuple[Tensor, Tensor, float]:
        began = time.perf_counter()
        tokens = self.tokenizer.encode(original)
        decoded = self.tokenizer.decode(tokens)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return decoded, tokens.bits_BNL, time.perf_counter() - began

    def _captions(self, result: Measured, place: int) -> tuple[list[float], list[float]]:
        shown = ([float(result.figures[row][name][place].mean()) for row in ROWS] for name in ("lpips", "psnr"))
        return next(shown), next(shown)

    def _pictured(self, result: Measured) -> list[int]:
        """The batch's best and worst, and a share of the others that depends on their keys only."""
        score_B = scores(result)
        chosen = np.flatnonzero(sampling_ranks(result.keys) <= self.pictured * (2.0**64 - 1))
        return sorted({int(score_B.argmin()), int(score_B.argmax()), *chosen.tolist()})


def scores(part: Measured) -> np.ndarray:
    """The model's LPIPS of each sample, (N,)."""
    lpips = part.figures["model"]["lpips"]
    return lpips.reshape(len(lpips), -1).mean(1)


class Totals:
    """Sums over everything measured; memory does not grow with the number of samples, but for one score of each.

    Args:
        bits: bits of a token (L).
        kind: who measured.
    """

    def __init__(self, bits: int, kind: type[Measurer]) -> None:
        self.usage = CodeUsage(bits)
        self.damaged: list[str] = []
        self.comparisons: list[Comparison] = []
        self.scores: list[float] = []
        self.samples, self._seconds, self._bits, self._kind = 0, 0.0, bits, kind
        self._sums: dict[str, dict[str, np.ndarray]] = {row: {} for row in ROWS}
        self._features: dict[str, FeatureStatistics] = {}

    def add(self, part: Measured) -> None:
        """Adds a batch."""
        self.damaged += part.damaged
        if part.packed is None:
            return
        for row, figures in part.figures.items():
            for name, value in figures.items():
                self._sums[row][name] = self._sums[row].get(name, 0.0) + value.sum(0)
        for row, features_ND in part.features.items():
            self._features.setdefault(row, FeatureStatistics(features_ND.shape[1])).update(features_ND, part.keys)
        self.usage.update(unpack_bits(torch.from_numpy(part.packed), self._bits))
        self.scores += scores(part).tolist()
        self.comparisons = keep(self.comparisons + part.comparisons)
        self.samples += len(part.keys)
        self._seconds += part.seconds

    def compute(self) -> dict[str, dict[str, float]]:
        """Figures by row and name; `samples_per_second` is that of one worker."""
        figures = {row: {name: float(value.mean()) for name, value in self._means(row).items()} for row in ROWS}
        if self._features:
            for row in ROWS:
                figures[row] |= self._kind.distances(self._features["original"], self._features[row])
        figures["model"] |= self.usage.compute() | {"samples_per_second": self.samples / self._seconds}
        return figures

    def by_frame(self) -> dict[str, dict[str, list[float]]]:
        """Of clips, the figures of the first, second, … frame, by row and name."""
        return {row: {name: v.tolist() for name, v in self._means(row).items() if v.ndim} for row in ROWS}

    def _means(self, row: str) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) / self.samples for name, value in self._sums[row].items()}
