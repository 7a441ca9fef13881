"""What is measured on clips: PSNR, SSIM, LPIPS of each frame, flicker of each clip, rFVD of all."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from bsq_ray.evaluation.reconstruction.batch_metrics import Measurer
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance
from bsq_ray.metrics.i3d import FEWEST_FRAMES, I3D
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.per_frame import by_frame, clip_psnr, clips_of, flicker, frames_of
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import structural_similarity


class ClipMeasurer(Measurer):
    """Measures clips (B, 3, T, H, W)."""

    networks = ("lpips-alex", "lpips-vgg", "fvd-i3d")

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], total: int) -> None:
        super().__init__(model_url, weights, total)
        self.i3d = I3D().to(self.device)

    def trivial(self, original: Tensor) -> Tensor:
        """See `Measurer.trivial`; each frame by itself."""
        return clips_of(self.codec.reconstruct(frames_of(original)), len(original))

    def figures(self, original: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """See `Measurer.figures`."""
        ssim = structural_similarity(frames_of(original), frames_of(reconstruction))
        return {
            **{name: value.unflatten(0, (len(original), -1)) for name, value in ssim.items()},
            "psnr": by_frame(psnr, original, reconstruction),
            "lpips": by_frame(partial(lpips, network="alex"), original, reconstruction),
            "lpips_vgg": by_frame(partial(lpips, network="vgg"), original, reconstruction),
            "psnr_clip": clip_psnr(original, reconstruction),
            "flicker": flicker(original, reconstruction),
        }

    def features(self, samples: Tensor) -> Tensor | None:
        """I3D's, (B, 400); clips that are too short for it have none."""
        if samples.shape[2] < FEWEST_FRAMES:
            return None
        features_BD: Tensor = self.i3d(samples)
        return features_BD

    @staticmethod
    def distances(original: FeatureStatistics, reconstruction: FeatureStatistics) -> dict[str, float]:
        """See `Measurer.distances`."""
        return {"rfvd": frechet_distance(original, reconstruction)}
