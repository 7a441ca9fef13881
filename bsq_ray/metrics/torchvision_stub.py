"""Makes `import torchvision` work beside a CPU build of torch.

The published torchvision is built for CUDA; without CUDA its compiled operators do not load and the import fails on
two operators it declares gradients-free shapes for. Defining them is enough: nothing here calls them.
"""

from __future__ import annotations

import sys

import torch

_library: torch.library.Library | None = None


def stub_torchvision_ops() -> None:
    """Call before the first import of torchvision, or of anything that imports it."""
    global _library
    if _library is not None or "torchvision" in sys.modules or torch.version.cuda is not None:
        return
    # Kept alive, because the definitions vanish with the object.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
