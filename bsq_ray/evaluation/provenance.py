"""What a figure needs beside it to be compared with another: the contract every result carries."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from bsq_ray.data.manifest import Manifest
from bsq_ray.metrics.pretrained_weights import resolve_once

# With fewer images FID says more about their number than about the model.
_MIN_FID_SAMPLES = 2048


def collect_provenance(
    manifest: Manifest,
    num_samples: int,
    size: int,
    resize_filter: str,
    networks: Sequence[str],
    num_generated: int | None = None,
) -> dict[str, Any]:
    """Conditions of a measurement, as plain data.

    Args:
        images: how many images or clips were measured.
        size: side of the images or frames, pixels.
        networks: names of the metric networks whose weights were used.
        drawn: how many other images they were compared with; None for their own reconstructions.
    """
    weights = {name: resolve_once(name) for name in networks}
    conditions: dict[str, Any] = {
        "data": manifest.url,
        "data_hash": manifest.hash,
        "kind": manifest.kind,
        "images": num_samples,
        "size": size,
        "resize": f"short side to {size} px ({resize_filter}), centre crop",
        "pixels": "originals and reconstructions rounded to 8 bits",
        "weights": {name: {"source": w.source, "sha256": w.sha256} for name, w in weights.items()},
        "versions": {
            "bsq_ray": _version("bsq-ray"),
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "ray", "lpips", "pytorch-msssim", "pillow")},
        },
    }
    smaller_count = num_samples if num_generated is None else min(num_samples, num_generated)
    if "fid-inception" in networks and smaller_count < _MIN_FID_SAMPLES:
        name = "rFID" if num_generated is None else "FID"
        conditions["warning"] = (
            f"{name} of {smaller_count} images is biased upwards; compare it only with {name} of the same images, or use KID"
        )
    if "fvd-i3d" in networks and num_samples < _MIN_FID_SAMPLES:
        conditions["warning"] = (
            f"rFVD of {num_samples} clips is biased upwards; compare it only with rFVD of the same clips"
        )
    return conditions


def _version(package: str) -> str:
    """Of what need not be there: one process measures without Ray, and a checkout is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
