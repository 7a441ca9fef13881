"""Measuring reconstructions batch by batch: what a worker does, and how results of many workers become one.

    images ─tokenizer─▶ reconstructions ─▶ `Measured`: figures and features of each image ─▶ `Totals`
           ─mean colours─▶ the trivial codec at the same bits, as a second row

A worker keeps nothing between batches, so a lost one is replaced without a trace.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bsq_ray.data.images import to_float, to_uint8
from bsq_ray.data.source import Samples
from bsq_ray.evaluation.baseline import MeanColourCodec
from bsq_ray.evaluation.pictures import Comparison, keep
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance, kernel_distance, sampling_ranks
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity
from bsq_ray.models.quantizers.bits import pack_bits, unpack_bits
from bsq_ray.models.quantizers.usage import CodeUsage
from bsq_ray.models.tokenizer import Tokenizer

ROWS = ("model", "mean colour")
# Pictures that travel from the workers, of images chosen by their keys.
_PICTURED = 256


@dataclass
class Measured:
    """What is known of a batch of N images.

    Attributes:
        figures: values (N,) by row and name of the metric.
        features: Inception features (N, D) of the originals (row "original") and of each row.
        packed: the tokens' bits, packed (N, tokens, bytes).
        comparisons: pictures of a few.
        seconds: for encoding and decoding.
        damaged: images that could not be read.
    """

    keys: list[str]
    damaged: list[str]
    figures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    packed: np.ndarray | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    seconds: float = 0.0


class Measurer:
    """Reconstructs images with a model folder's tokenizer and measures them.

    Args:
        total: images of the whole data set, which decides how many pictures are taken.
    """

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], total: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = Tokenizer.from_pretrained(model_url, weights).to(self.device)
        section = self.tokenizer.config
        self.codec = MeanColourCodec(section.patch_size, section.quantizer.bits)
        self.inception = Inception().to(self.device)
        self.pictured = min(1.0, _PICTURED / total)

    def __call__(self, samples: Samples) -> Measured:
        """Measures one batch; pixels are rounded to 8 bits first."""
        result = Measured(samples.keys, samples.damaged)
        if not samples.keys:
            return result
        original_BCHW = to_float(torch.from_numpy(samples.values_P).to(self.device))
        decoded_BCHW, bits_BNL, result.seconds = self._reconstruct(original_BCHW)
        result.packed = pack_bits(bits_BNL).cpu().numpy()
        images = dict(zip(ROWS, (decoded_BCHW, self.codec.reconstruct(original_BCHW)), strict=True))
        images = {row: to_float(to_uint8(images_BCHW)) for row, images_BCHW in images.items()}
        result.features = {
            row: self._features(x_BCHW) for row, x_BCHW in (images | {"original": original_BCHW}).items()
        }
        for row, images_BCHW in images.items():
            values = structural_similarity(original_BCHW, images_BCHW)
            values["psnr"] = psnr(original_BCHW, images_BCHW)
            values["lpips"] = lpips(original_BCHW, images_BCHW, "alex")
            values["lpips_vgg"] = lpips(original_BCHW, images_BCHW, "vgg")
            result.figures[row] = {name: value_B.double().cpu().numpy() for name, value_B in values.items()}
        pixels_RBCHW = [to_uint8(x_BCHW).cpu().numpy() for x_BCHW in (original_BCHW, *images.values())]
        result.comparisons = [
            Comparison(samples.keys[n], np.stack([row[n] for row in pixels_RBCHW]), *self._captions(result, n))
            for n in self._pictured(result)
        ]
        return result

    def _reconstruct(self, original_BCHW: Tensor) -> tuple[Tensor, Tensor, float]:
        began = time.perf_counter()
        tokens = self.tokenizer.encode(original_BCHW)
        decoded_BCHW = self.tokenizer.decode(tokens)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return decoded_BCHW, tokens.bits_BNL, time.perf_counter() - began

    def _features(self, images_BCHW: Tensor) -> np.ndarray:
        features_BD: np.ndarray = self.inception(images_BCHW).cpu().numpy()
        return features_BD

    def _captions(self, result: Measured, place: int) -> tuple[list[float], list[float]]:
        shown = ([float(result.figures[row][name][place]) for row in ROWS] for name in ("lpips", "psnr"))
        return next(shown), next(shown)

    def _pictured(self, result: Measured) -> list[int]:
        """The batch's best and worst, and a share of the others that depends on their keys only."""
        score_B = result.figures["model"]["lpips"]
        chosen = np.flatnonzero(sampling_ranks(result.keys) <= self.pictured * (2.0**64 - 1))
        return sorted({int(score_B.argmin()), int(score_B.argmax()), *chosen.tolist()})


class Totals:
    """Sums over everything measured; memory does not grow with the number of images, but for one score of each.

    Args:
        bits: bits of a token (L).
    """

    def __init__(self, bits: int) -> None:
        self.usage = CodeUsage(bits)
        self.damaged: list[str] = []
        self.comparisons: list[Comparison] = []
        self.scores: list[float] = []
        self.images, self._seconds, self._bits = 0, 0.0, bits
        self._sums: dict[str, dict[str, float]] = {row: {} for row in ROWS}
        self._features = {row: FeatureStatistics() for row in ("original", *ROWS)}

    def add(self, part: Measured) -> None:
        """Adds a batch."""
        self.damaged += part.damaged
        if part.packed is None:
            return
        for row, figures in part.figures.items():
            for name, value_N in figures.items():
                self._sums[row][name] = self._sums[row].get(name, 0.0) + float(value_N.sum())
        for row, features_ND in part.features.items():
            self._features[row].update(features_ND, part.keys)
        self.usage.update(unpack_bits(torch.from_numpy(part.packed), self._bits))
        self.scores += part.figures["model"]["lpips"].tolist()
        self.comparisons = keep(self.comparisons + part.comparisons)
        self.images += len(part.keys)
        self._seconds += part.seconds

    def compute(self) -> dict[str, dict[str, float]]:
        """Figures by row and name; `images_per_second` is that of one worker."""
        originals = self._features["original"]
        figures = {row: {name: value / self.images for name, value in self._sums[row].items()} for row in ROWS}
        for row in ROWS:
            figures[row]["rfid"] = frechet_distance(originals, self._features[row])
            figures[row]["kid"] = kernel_distance(originals.kept(), self._features[row].kept())
        figures["model"] |= self.usage.compute() | {"images_per_second": self.images / self._seconds}
        return figures
