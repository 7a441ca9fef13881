"""Rate and quality of a compressed image: PSNR, LPIPS, and the sizes of JPEG and WebP files of equal quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from bsq_ray.data.transforms import to_float
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.metrics.lpips import MIN_SIDE, lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.serving.payloads import EqualQualityFile, QualityReport

_BASELINE_CODECS = ("JPEG", "WebP")
# Largest width and height that their encoders accept.
_MAX_SIDES = {"JPEG": 65500, "WebP": 16383}
# Encoder qualities that are compared; a finer scale would cost more passes through the LPIPS network.
_QUALITIES = (1, 2, 3, 5, 8, 12, 18, 26, 36, 48, 62, 78, 95)


def measure_quality(
    original: Image.Image, decoded: Image.Image, *, num_bytes: int, check_deadline: Callable[[], None]
) -> QualityReport:
    """Measure the quality of a decoded image whose file has `num_bytes` bytes.

    Args:
        check_deadline: called between parts of the work; an exception from it ends the measurement.

    Raises:
        ValueError: the weights of the LPIPS network are not on this node.
    """
    original_BCHW = _to_tensor(original)
    metrics: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"psnr": psnr}
    if min(original.size) >= MIN_SIDE["alex"]:
        metrics["lpips"] = lpips
    metric_values = {name: float(metric(original_BCHW, _to_tensor(decoded))) for name, metric in metrics.items()}
    codecs = standard_codecs()
    equal: dict[str, dict[str, EqualQualityFile | None]] = {}
    for name, metric in metrics.items():
        # Higher PSNR is better, lower LPIPS is better.
        sign = 1 if name == "psnr" else -1
        equal[name] = {}
        for codec in _BASELINE_CODECS:

            def encode_at_quality(
                quality: int, codec: str = codec, metric: Any = metric, sign: int = sign
            ) -> tuple[int, float]:
                check_deadline()
                data = codecs[codec].encode(original, quality)
                return len(data), sign * float(metric(original_BCHW, _to_tensor(codecs[codec].decode(data))))

            can_encode = max(original.size) <= _MAX_SIDES[codec]
            equal[name][codec] = (
                _smallest_quality_reaching(encode_at_quality, sign * metric_values[name]) if can_encode else None
            )
    bits_per_pixel = 8 * num_bytes / (original.width * original.height)
    return {
        "width": original.width, "height": original.height, "bytes": num_bytes, "bits_per_pixel": bits_per_pixel,
        "psnr": metric_values["psnr"], "lpips": metric_values.get("lpips"), "equal": equal,
    }  # fmt: skip


def _smallest_quality_reaching(
    encode_at_quality: Callable[[int], tuple[int, float]], target: float
) -> EqualQualityFile | None:
    """Find the lowest encoder quality whose metric value is at least `target`, by bisection."""
    num_bytes, metric_value = encode_at_quality(_QUALITIES[0])
    if metric_value >= target:
        return {"bytes": num_bytes, "quality": _QUALITIES[0], "better": metric_value > target}
    best: EqualQualityFile | None = None
    low, high = 0, len(_QUALITIES)
    while high - low > 1:
        middle = (low + high) // 2
        num_bytes, metric_value = encode_at_quality(_QUALITIES[middle])
        if metric_value >= target:
            best = {"bytes": num_bytes, "quality": _QUALITIES[middle], "better": False}
            high = middle
        else:
            low = middle
    return best


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as (1, 3, H, W) in [-1, 1]."""
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
