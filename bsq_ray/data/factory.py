"""Build the data source that a configuration reads."""

from __future__ import annotations

from bsq_ray import config
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.mixture import MixtureSource, is_mixture, read_mixture
from bsq_ray.data.token_table import TokenSource, read_table


def build_source(run: config.AnyConfig, url: str) -> DataSource:
    """Open the training data of a run: packed images or videos, a token table, or a mixture of them.

    Args:
        run: configuration of the run; its stage decides the kind of data.
        url: folder of the data set, or YAML file of a mixture.

    Raises:
        ValueError: the data set is missing, damaged, or of another kind.
    """
    if is_mixture(url):
        datasets = read_mixture(url).datasets
        sources = [build_source(run, dataset.url) for dataset in datasets]
        if empty := [source.url for source in sources if not source.num_samples]:
            raise ValueError(f"{empty[0]} contains no samples; remove it from {url}")
        weights = [dataset.weight for dataset in datasets if dataset.weight is not None]
        return MixtureSource(url, sources, weights or None)
    if not isinstance(run, config.TokenizerConfig):
        return TokenSource(read_table(url), run.model, run.training.storage_timeout_s)
    manifest = read_manifest(url)
    if manifest.kind == "images" and run.model.frames > 1:
        raise ValueError(
            f"{url} contains images, but {run.name} trains on clips of {run.model.frames} frames; "
            "pack videos with `bsq-ray data pack --kind videos`, or train with model.frames=1"
        )
    return build_pixel_source(run, manifest)


def build_pixel_source(run: config.TokenizerConfig, manifest: Manifest) -> DataSource:
    """Open packed images or videos for a tokenizer; a video tokenizer reads an image as a clip of one frame.

    Raises:
        ValueError: the data set has videos but the tokenizer reads only images, or no video is long enough.
    """
    timeout_s = run.training.storage_timeout_s
    if manifest.kind == "images":
        return ImageSource(manifest, run.data, run.model.image_size, timeout_s)
    if run.model.frames == 1:
        raise ValueError(
            f"{manifest.url} contains videos, but {run.name} takes images; "
            "use packed images, or a configuration with model.frames above 1"
        )
    return ClipSource(manifest, run.data, run.model.image_size, run.model.frames, timeout_s)


def resolve_tokenizer(run: config.AnyConfig, url: str) -> config.AnyConfig:
    """Return the configuration with the tokenizer of the data: a token model belongs to the one that made its tokens.

    Raises:
        ValueError: there is no complete token table.
    """
    if isinstance(run, config.TokenizerConfig) or run.model.tokenizer is not None:
        return run
    if is_mixture(url):
        url = read_mixture(url).datasets[0].url
    tokenizer = read_table(url).info.tokenizer_id
    return run.model_copy(update={"model": run.model.model_copy(update={"tokenizer": tokenizer})})
