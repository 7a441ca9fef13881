"""What is measured on images: PSNR, SSIM, LPIPS of each, rFID and KID of all."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bsq_ray.evaluation.reconstruction.batch_metrics import ReconstructionMetrics
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance, kernel_distance
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity


class ImageReconstructionMetrics(ReconstructionMetrics):
    """Measures images (B, 3, H, W)."""

    networks = ("lpips-alex", "lpips-vgg", "fid-inception")

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], total: int) -> None:
        super().__init__(model_url, weights, total)
        self.inception = Inception().to(self.device)

    def baseline(self, original: Tensor) -> Tensor:
        """See `Measurer.trivial`."""
        return self.baseline_codec.reconstruct(original)

    def sample_metrics(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """See `Measurer.figures`."""
        return structural_similarity(original, reconstruction) | {
            "psnr": psnr(original, reconstruction),
            "lpips": lpips(original, reconstruction, "alex"),
            "lpips_vgg": lpips(original, reconstruction, "vgg"),
        }

    def features(self, samples: Tensor) -> Tensor:
        """Inception's, (B, 2048)."""
        features_BD: Tensor = self.inception(samples)
        return features_BD

    @staticmethod
    def distribution_metrics(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """See `Measurer.distances`."""
        return {
            "rfid": frechet_distance(original, reconstruction),
            "kid": kernel_distance(original.kid_subset(), reconstruction.kid_subset()),
        }
