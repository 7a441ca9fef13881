"""Metrics of reconstructed clips: PSNR, SSIM and LPIPS per frame, PSNR and flicker per clip, rFVD of the data set."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from bsq_ray.evaluation.reconstruction.batch_metrics import ReconstructionMetrics
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance
from bsq_ray.metrics.i3d import I3D, MIN_FRAMES
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.per_frame import clip_psnr, flicker, metric_per_frame
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity
from bsq_ray.models.frame_layout import clips_from_batch_major, frames_batch_major


class ClipReconstructionMetrics(ReconstructionMetrics):
    """Computes reconstruction metrics of clips (B, 3, T, H, W) with values in [-1, 1]."""

    networks = ("lpips-alex", "lpips-vgg", "fvd-i3d")

    def load_feature_network(self) -> None:
        """Load I3D."""
        self.i3d = I3D().to(self.device)

    def reconstruct_baseline(self, original: Tensor) -> Tensor:
        """Reconstruct each frame independently with the mean-color codec."""
        return clips_from_batch_major(self.baseline_codec.reconstruct(frames_batch_major(original)), len(original))

    def sample_metrics(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Return metrics per frame (B, T), and "psnr_clip" (dB) and "flicker" (8-bit levels) per clip (B,)."""
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
        """Return the I3D logits (B, 400), or None if the clips are too short for I3D."""
        if samples.shape[2] < MIN_FRAMES:
            return None
        features_BD: Tensor = self.i3d(samples)
        return features_BD

    @staticmethod
    def distribution_metrics(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """Return rFVD, the Fréchet distance between the I3D logits of originals and reconstructions."""
        return {"rfvd": frechet_distance(original, reconstruction)}
