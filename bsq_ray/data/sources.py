"""The source that a configuration reads."""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.photos import PhotoSource
from bsq_ray.data.source import Source


def open_source(run: config.TokenizerConfig, url: str) -> Source:
    """What lies at `url`, read as the run's configuration says.

    Raises:
        ValueError: it is missing, damaged, or not what this stage trains on.
    """
    return PhotoSource(read_manifest(url), run.data, run.model.image_size)
