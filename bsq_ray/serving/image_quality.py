"""How good a picture is for its bits: PSNR, LPIPS, and the size of a JPEG and a WebP file of equal quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image

from bsq_ray.data.transforms import to_float
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr

_BASELINE_CODECS = ("JPEG", "WebP")
# Of files that are compared; a finer ladder would cost more looks through the LPIPS network.
_QUALITIES = (1, 2, 3, 5, 8, 12, 18, 26, 36, 48, 62, 78, 95)


class QualityReport(TypedDict):
    """What was measured.

    `equal` says for each metric and codec the smallest file that is at least as good: its `bytes` and `quality`;
    `better` where even its worst quality is better, `None` where its best one is not as good.
    """

    width: int
    height: int
    bytes: int
    bits_per_pixel: float
    psnr: float
    lpips: float
    equal: dict[str, dict[str, Any]]


def measure_quality(
    original: Image.Image, decoded: Image.Image, num_bytes: int, check_deadline: Callable[[], None]
) -> QualityReport:
    """Figures of a picture that a file of `size` bytes shows.

    Args:
        check: called between the parts of the work; what it raises ends it.

    Raises:
        ValueError: the LPIPS network's weights are not on this machine.
    """
    original_BCHW = _to_tensor(original)
    metrics = {"psnr": psnr, "lpips": lpips}
    metric_values = {name: float(metric(original_BCHW, _to_tensor(decoded))) for name, metric in metrics.items()}
    codecs = standard_codecs()
    equal: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        sign = 1 if name == "psnr" else -1
        equal[name] = {}
        for codec in _BASELINE_CODECS:

            def encode_at_quality(
                quality: int, codec: str = codec, metric: Any = metric, sign: int = sign
            ) -> tuple[int, float]:
                check_deadline()
                data = codecs[codec].encode(original, quality)
                return len(data), sign * float(metric(original_BCHW, _to_tensor(codecs[codec].decode(data))))

            equal[name][codec] = _smallest_quality_reaching(encode_at_quality, sign * metric_values[name])
    bits_per_pixel = 8 * num_bytes / (original.width * original.height)
    return {
        "width": original.width, "height": original.height, "bytes": num_bytes, "bits_per_pixel": bits_per_pixel,
        "psnr": metric_values["psnr"], "lpips": metric_values["lpips"], "equal": equal,
    }  # fmt: skip


def _smallest_quality_reaching(
    encode_at_quality: Callable[[int], tuple[int, float]], target: float
) -> dict[str, Any] | None:
    """The lowest quality whose picture is at least as good as wanted, by bisection."""
    size, metric_value = encode_at_quality(_QUALITIES[0])
    if metric_value >= target:
        return {"bytes": size, "quality": _QUALITIES[0], "better": metric_value > target}
    best = None
    low, high = 0, len(_QUALITIES)
    while high - low > 1:
        middle = (low + high) // 2
        size, metric_value = encode_at_quality(_QUALITIES[middle])
        if metric_value >= target:
            best = {"bytes": size, "quality": _QUALITIES[middle], "better": False}
            high = middle
        else:
            low = middle
    return best


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
