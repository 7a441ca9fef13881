"""What is measured on clips: PSNR, SSIM, LPIPS of each frame, flicker of each clip, rFVD of all."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from bsq_ray.evaluation.reconstruction.batch_metrics import ReconstructionMetrics
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance
from bsq_ray.metrics.i3d import I3D, MIN_FRAMES
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.per_frame import clip_psnr, clips_from_batch_major, flicker, frames_batch_major, metric_per_frame
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity


class ClipReconstructionMetrics(ReconstructionMetrics):
    """Measures clips (B, 3, T, H, W)."""

    networks = ("lpips-alex", "lpips-vgg", "fvd-i3d")

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], total: int) -> None:
        super().__init__(model_url, weights, total)
        self.i3d = I3D().to(self.device)

    def baseline(self, original: Tensor) -> Tensor:
        """See `Measurer.trivial`; each frame by itself."""
        return clips_from_batch_major(self.baseline_codec.reconstruct(frames_batch_major(original)), len(original))

    def sample_metrics(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """See `Measurer.figures`."""
        ssim = structural_similarity(frames_batch_major(original), frames_batch_major(reconstruction))
        return {
            **{name: value.unflatten(0, (len(original), -1)) for name, value in ssim.items()},
            "psnr": metric_per_frame(psnr, original, reconstruction),
            "lpips": metric_per_frame(partial(lpips, network="alex"), original, reconstruction),
            "lpips_vgg": metric_per_frame(partial(lpips, network="vgg"), original, reconstruction),
            "psnr_clip": clip_psnr(original, reconstruction),
            "flicker": flicker(original, reconstruction),
        }

    def features(self, samples: Tensor) -> Tensor | None:
        """I3D's, (B, 400); clips that are too short for it have none."""
        if samples.shape[2] < MIN_FRAMES:
            return None
        features_BD: Tensor = self.i3d(samples)
        return features_BD

    @staticmethod
    def distribution_metrics(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """See `Measurer.distances`."""
        return {"rfvd": frechet_distance(original, reconstruction)}
