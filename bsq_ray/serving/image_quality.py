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

_NAMES = ("JPEG", "WebP")
# Of files that are compared; a finer ladder would cost more looks through the LPIPS network.
_QUALITIES = (1, 2, 3, 5, 8, 12, 18, 26, 36, 48, 62, 78, 95)


class Figures(TypedDict):
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


def measure(original: Image.Image, shown: Image.Image, size: int, check: Callable[[], None]) -> Figures:
    """Figures of a picture that a file of `size` bytes shows.

    Args:
        check: called between the parts of the work; what it raises ends it.

    Raises:
        ValueError: the LPIPS network's weights are not on this machine.
    """
    original_BCHW = _tensor(original)
    metrics = {"psnr": psnr, "lpips": lpips}
    ours = {name: float(metric(original_BCHW, _tensor(shown))) for name, metric in metrics.items()}
    codecs = standard_codecs()
    equal: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        sign = 1 if name == "psnr" else -1
        equal[name] = {}
        for codec in _NAMES:

            def at(quality: int, codec: str = codec, metric: Any = metric, sign: int = sign) -> tuple[int, float]:
                check()
                data = codecs[codec].encode(original, quality)
                return len(data), sign * float(metric(original_BCHW, _tensor(codecs[codec].decode(data))))

            equal[name][codec] = _smallest(at, sign * ours[name])
    rate = 8 * size / (original.width * original.height)
    return {
        "width": original.width, "height": original.height, "bytes": size, "bits_per_pixel": rate,
        "psnr": ours["psnr"], "lpips": ours["lpips"], "equal": equal,
    }  # fmt: skip


def _smallest(at: Callable[[int], tuple[int, float]], wanted: float) -> dict[str, Any] | None:
    """The lowest quality whose picture is at least as good as wanted, by bisection."""
    size, reached = at(_QUALITIES[0])
    if reached >= wanted:
        return {"bytes": size, "quality": _QUALITIES[0], "better": reached > wanted}
    found = None
    low, high = 0, len(_QUALITIES)
    while high - low > 1:
        middle = (low + high) // 2
        size, reached = at(_QUALITIES[middle])
        if reached >= wanted:
            found = {"bytes": size, "quality": _QUALITIES[middle], "better": False}
            high = middle
        else:
            low = middle
    return found


def _tensor(image: Image.Image) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
