"""The source that a configuration reads."""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.photos import PhotoSource
from bsq_ray.data.source import Source
from bsq_ray.data.tokens import TokenSource, read_table


def open_source(run: config.AnyConfig, url: str) -> Source:
    """What lies at `url`, read as the run's configuration says: packed images, or a token table.

    Raises:
        ValueError: it is missing, damaged, or not what this stage trains on.
    """
    if isinstance(run, config.TokenizerConfig):
        return PhotoSource(read_manifest(url), run.data, run.model.image_size)
    return TokenSource(read_table(url), run.model)
