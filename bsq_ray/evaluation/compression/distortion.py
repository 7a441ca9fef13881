"""Distortion of decoded frames: PSNR, MS-SSIM, LPIPS and DISTS.

Shape suffixes: T frames (1 for an image), H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bsq_ray.data.transforms import to_float
from bsq_ray.metrics import dists
from bsq_ray.metrics.lpips import MIN_SIDE as LPIPS_SIDE
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import MS_SSIM_SIDE, multi_scale_similarity

METRICS = ("psnr", "ms_ssim", "lpips", "dists")
LOWER_IS_BETTER = frozenset({"lpips", "dists"})
# Smallest height and width for which a metric is defined.
MIN_SIDES = {"psnr": 1, "ms_ssim": MS_SSIM_SIDE + 1, "lpips": LPIPS_SIDE["alex"], "dists": dists.MIN_SIDE}
# Metrics of networks use this many evenly spaced frames of a clip: they take longer than all others together.
_NETWORK_METRICS, _NETWORK_FRAMES = frozenset({"lpips", "dists"}), 8
# Feature maps of an original are stored up to this size, where they take 0.5 GB; above, each codec computes them again.
_MAX_STORED_PIXELS = 2**20


class DistortionMeter:
    """Compares the frames that codecs decode with one original.

    Args:
        original_THW3: frames, uint8 (T, H, W, 3).
        metrics: names of the metrics; those for which the frames are too small are omitted.
    """

    def __init__(self, original_THW3: np.ndarray, metrics: Sequence[str] = METRICS) -> None:
        self._original_THW3 = original_THW3
        num_frames, min_side = len(original_THW3), min(original_THW3.shape[1:3])
        self._metrics = tuple(name for name in metrics if min_side >= MIN_SIDES[name])
        indices = np.linspace(0, num_frames - 1, min(num_frames, _NETWORK_FRAMES)).round().astype(int)
        self._network_frames = frozenset(indices.tolist())
        self._original_maps: list[Tensor] | None = None

    def measure(self, decoded_THW3: np.ndarray) -> dict[str, float]:
        """Return the mean of each metric over frames, of LPIPS and DISTS over some of them."""
        assert decoded_THW3.shape == self._original_THW3.shape, f"a codec returned {decoded_THW3.shape}"
        functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psnr": psnr, "ms_ssim": multi_scale_similarity, "lpips": lpips, "dists": self._dists
        }  # fmt: skip
        values: dict[str, list[float]] = {name: [] for name in self._metrics}
        for t, (original_HW3, decoded_HW3) in enumerate(zip(self._original_THW3, decoded_THW3, strict=True)):
            pair = _to_tensor(original_HW3), _to_tensor(decoded_HW3)
            for name, each in values.items():
                if name not in _NETWORK_METRICS or t in self._network_frames:
                    each.append(float(functions[name](*pair)))
        return {name: float(np.mean(each)) for name, each in values.items()}

    @torch.no_grad()
    def _dists(self, original_BCHW: Tensor, decoded_BCHW: Tensor) -> Tensor:
        num_frames, height, width = self._original_THW3.shape[:3]
        if num_frames > 1 or height * width > _MAX_STORED_PIXELS:
            return dists.dists(original_BCHW, decoded_BCHW)
        network = dists.load_network(str(original_BCHW.device))
        if self._original_maps is None:
            self._original_maps = list(network.feature_maps(original_BCHW))
        return network.distance(self._original_maps, network.feature_maps(decoded_BCHW))


def _to_tensor(pixels_HW3: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(np.array(pixels_HW3)).permute(2, 0, 1)[None])
