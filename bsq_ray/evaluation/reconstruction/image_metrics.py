"""Metrics of reconstructed images: PSNR, SSIM, LPIPS per image, rFID and KID of the set."""

from __future__ import annotations

from torch import Tensor

from bsq_ray.evaluation.reconstruction.batch_metrics import ReconstructionMetrics
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance, paired_kernel_distance
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity


class ImageReconstructionMetrics(ReconstructionMetrics):
    """Measure images (B, 3, H, W)."""

    networks = ("lpips-alex", "lpips-vgg", "fid-inception")

    def load_feature_network(self) -> None:
        """Load Inception."""
        self.inception = Inception().to(self.device)

    def reconstruct_baseline(self, original: Tensor) -> Tensor:
        """See `ReconstructionMetrics.reconstruct_baseline`."""
        return self.baseline_codec.reconstruct(original)

    def sample_metrics(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """See `ReconstructionMetrics.sample_metrics`."""
        return structural_similarity(original, reconstruction) | {
            "psnr": psnr(original, reconstruction),
            "lpips": lpips(original, reconstruction, "alex"),
            "lpips_vgg": lpips(original, reconstruction, "vgg"),
        }

    def features(self, samples: Tensor) -> Tensor:
        """Return Inception's features (B, 2048)."""
        features_BD: Tensor = self.inception(samples)
        return features_BD

    @staticmethod
    def distribution_metrics(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """See `ReconstructionMetrics.distribution_metrics`."""
        kid = paired_kernel_distance(original.kid_subset(), reconstruction.kid_subset())
        metrics = {"rfid": frechet_distance(original, reconstruction), "kid": kid.value}
        return metrics if kid.standard_error is None else metrics | {"kid_standard_error": kid.standard_error}
