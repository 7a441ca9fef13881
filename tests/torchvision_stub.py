"""Make `import torchvision` work with a CPU build of torch, for the public implementations in the tests.

The published torchvision is built for CUDA. Without CUDA its operators do not load, and the import fails at two
operators for which it registers shape functions. Defining the operators is enough; the tests do not call them.
"""

from __future__ import annotations

import sys

import torch

_library: torch.library.Library | None = None


def stub_torchvision_ops() -> None:
    """Define the operators; call it before the first import of torchvision."""
    global _library
    if _library is not None or "torchvision" in sys.modules or torch.version.cuda is not None:
        return
    # The definitions exist as long as this object.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
