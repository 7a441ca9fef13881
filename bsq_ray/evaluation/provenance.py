"""Provenance stored with every result: data, preprocessing, metric weights and versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from bsq_ray.data.manifest import Manifest
from bsq_ray.data.packing import describe_packing
from bsq_ray.models.pretrained_weights import resolve_once

# With fewer images, the bias of FID exceeds the differences between models.
_MIN_FID_SAMPLES = 2048


def collect_provenance(
    manifest: Manifest,
    num_samples: int,
    *,
    size: int,
    resize_filter: str,
    networks: Sequence[str],
    num_generated: int | None = None,
) -> dict[str, Any]:
    """Return the provenance of a measurement as a JSON-compatible dict.

    Args:
        manifest: manifest of the data set.
        num_samples: number of images or clips that were measured.
        size: side of the images or frames in pixels.
        resize_filter: interpolation of the resize.
        networks: names of the metric networks.
        num_generated: number of generated images; None if the samples were compared with their reconstructions.
    """
    weights = {name: resolve_once(name) for name in networks}
    provenance: dict[str, Any] = {
        "data": manifest.url,
        "data_hash": manifest.hash,
        "kind": manifest.kind,
        "num_samples": num_samples,
        "packing": describe_packing(manifest.packing),
        "size": size,
        "resize": f"short side to {size} px ({resize_filter}), center crop",
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
        provenance["warning"] = (
            f"{name} of {smaller_count} images is biased upward; compare it only with {name} of the same images, "
            "or use KID"
        )
    if "fvd-i3d" in networks and num_samples < _MIN_FID_SAMPLES:
        provenance["warning"] = (
            f"rFVD of {num_samples} clips is biased upward; compare it only with rFVD of the same clips"
        )
    return provenance


def _version(package: str) -> str:
    """Return the version of a package, or "not installed": Ray is optional, and a checkout has no metadata."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
