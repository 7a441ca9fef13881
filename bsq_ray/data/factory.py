"""Build the data source that a configuration reads."""

from __future__ import annotations

from collections.abc import Sequence

from bsq_ray import config
from bsq_ray.data.batch_mixture import BatchMixtureSource
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.crop_sizes import CropSizeSource
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.mixture import MixtureSource, is_mixture, read_mixture
from bsq_ray.data.token_table import TokenSource, read_table


def build_source(run: config.AnyConfig, url: str) -> DataSource:
    """Open the training data of a run: packed images or videos, a token table, or a mixture of them.

    With `data.crop_sizes`, each batch has crops of one of these sizes.

    Args:
        run: configuration of the run; its stage decides the kind of data.
        url: folder of the data set, or YAML file of a mixture; a mixture of images and videos has batches of each kind.

    Raises:
        ValueError: the data set is missing, damaged, or of another kind.
    """
    source = _build_data_source(run, url)
    if not isinstance(run, config.TokenizerConfig) or not run.data.crop_sizes:
        return source
    assert isinstance(source, ImageSource | ClipSource | MixtureSource | BatchMixtureSource)
    return CropSizeSource(source, run.data.crop_sizes, run.training.batch_size)


def _build_data_source(run: config.AnyConfig, url: str) -> DataSource:
    if is_mixture(url):
        return _build_mixture(run, url)
    if not isinstance(run, config.TokenizerConfig):
        return TokenSource(read_table(url), run.model, run.training.storage_timeout_s)
    manifest = read_manifest(url)
    _check_has_videos(run, url, [manifest.kind])
    return build_pixel_source(run, manifest)


def _build_mixture(run: config.AnyConfig, url: str) -> DataSource:
    """Open the data sets of a mixture; those of a causal video tokenizer are videos, or videos and images."""
    datasets = read_mixture(url).datasets
    sources = [
        build_pixel_source(run, read_manifest(dataset.url))
        if isinstance(run, config.TokenizerConfig) and not is_mixture(dataset.url)
        else _build_data_source(run, dataset.url)
        for dataset in datasets
    ]
    if empty := [source.url for source in sources if not source.num_samples]:
        raise ValueError(f"{empty[0]} contains no samples; remove it from {url}")
    weights = [
        source.num_samples if dataset.weight is None else dataset.weight
        for dataset, source in zip(datasets, sources, strict=True)
    ]
    if not isinstance(run, config.TokenizerConfig) or run.model.frames == 1:
        return MixtureSource(url, sources, weights)
    are_images = [isinstance(source, ImageSource) for source in sources]
    _check_has_videos(run, url, ["images" if is_image else "videos" for is_image in are_images])
    if not any(are_images):
        return MixtureSource(url, sources, weights)
    _check_trains_on_images(run, url, sources)
    images, clips = (
        MixtureSource(
            url,
            [source for source, is_image in zip(sources, are_images, strict=True) if is_image == takes_images],
            [weight for weight, is_image in zip(weights, are_images, strict=True) if is_image == takes_images],
        )
        for takes_images in (True, False)
    )
    return BatchMixtureSource(images, clips, run.training.batch_size)


def _check_has_videos(run: config.TokenizerConfig, url: str, kinds: Sequence[str]) -> None:
    if run.model.frames > 1 and set(kinds) == {"images"}:
        raise ValueError(
            f"{url} contains images, but {run.name} trains on clips of {run.model.frames} frames; "
            "pack videos with `bsq-ray data pack --kind videos`, list them and the images in a YAML file for --data, "
            "or train with model.frames=1"
        )


def _check_trains_on_images(run: config.TokenizerConfig, url: str, sources: Sequence[DataSource]) -> None:
    """Check that a video tokenizer can train on images, too.

    Raises:
        ValueError: the model is not causal, its discriminator scores whole clips, or mixtures are nested.
    """
    if any(isinstance(source, BatchMixtureSource) for source in sources):
        raise ValueError(f"{url} lists a YAML file of images and videos; list its data sets instead")
    if not run.model.causal:
        raise ValueError(
            f"{url} mixes images and videos, and only a causal model takes an image as a clip of one frame; set "
            "model.causal=true, or list videos only"
        )
    if run.loss.adversarial.weight and run.loss.adversarial.discriminator == "stylegan2-3d":
        raise ValueError(
            f"{url} mixes images and videos, and the discriminator stylegan2-3d scores whole clips; set "
            "loss.adversarial.discriminator=stylegan2, or list videos only"
        )


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
    info = read_table(url).info
    update = {"tokenizer": info.tokenizer_id, "tokens_id": info.tokens_id}
    return run.model_copy(update={"model": run.model.model_copy(update=update)})
