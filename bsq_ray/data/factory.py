"""The source that a configuration reads."""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.token_table import TokenSource, read_table


def build_source(run: config.AnyConfig, url: str) -> DataSource:
    """What lies at `url`, read as the run's configuration says: packed images or videos, or a token table.

    Raises:
        ValueError: it is missing, damaged, or not what this stage trains on.
    """
    if not isinstance(run, config.TokenizerConfig):
        return TokenSource(read_table(url), run.model, run.training.storage_timeout_s)
    manifest = read_manifest(url)
    if manifest.kind == "images" and run.model.frames > 1:
        raise ValueError(
            f"{url} holds images, but {run.name} trains on clips of {run.model.frames} frames; "
            "pack videos with `bsq-ray data pack --kind videos`, or train with model.frames=1"
        )
    return build_pixel_source(run, manifest)


def build_pixel_source(run: config.TokenizerConfig, manifest: Manifest) -> DataSource:
    """Packed images or videos as a tokenizer takes them; for one that takes clips, an image is a clip of one frame.

    Raises:
        ValueError: they are videos and the tokenizer takes only images, or no video is long enough.
    """
    timeout_s = run.training.storage_timeout_s
    if manifest.kind == "images":
        return ImageSource(manifest, run.data, run.model.image_size, timeout_s)
    if run.model.frames == 1:
        raise ValueError(
            f"{manifest.url} holds videos, but {run.name} takes images; "
            "use packed images, or a configuration with model.frames above 1"
        )
    return ClipSource(manifest, run.data, run.model.image_size, run.model.frames, timeout_s)


def resolve_tokenizer(run: config.AnyConfig, url: str) -> config.AnyConfig:
    """The configuration with what the data at `url` decide: a model of tokens belongs to the tokenizer that made them.

    Raises:
        ValueError: there is no whole token table.
    """
    if isinstance(run, config.TokenizerConfig) or run.model.tokenizer is not None:
        return run
    tokenizer = read_table(url).info.tokenizer_id
    return run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": tokenizer})})
