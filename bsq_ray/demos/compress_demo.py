"""Compression demo.

images ─▶ tokenizer ─▶ token tables ─▶ prior ─▶ rate and distortion on held-out images
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsq_ray import config
from bsq_ray.demos.prepare_data import UNLIMITED_STEPS, log
from bsq_ray.demos.token_pipeline import PHOTO_DETAILS, WORKERS, TokenPipeline


def run_demo(
    images: Path | None,
    out: Path,
    minutes: float,
    train_images: Path | None = None,
    tokenizer_overrides: tuple[str, ...] = (),
    prior_overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train a tokenizer and a prior, and compare them with standard codecs.

    Args:
        images: folder of images to compress; None collects 24 wallpapers from packages.
        out: output folder.
        minutes: total training time of both models.
        train_images: folder with one subfolder of training images per class; None collects photos from packages.
        tokenizer_overrides, prior_overrides: `key=value` overrides of the presets `demo-any-size` and `prior-demo`.

    Returns:
        The results of `evaluate_compression`.

    Raises:
        ValueError: there are too few training images.
    """
    from bsq_ray.evaluation.compression.distortion import METRICS
    from bsq_ray.runtime.ray_session import ray_session

    pipeline = TokenPipeline(train_images, out, minutes, PHOTO_DETAILS)
    images = images or _collect_images(out)
    with ray_session():
        pipeline.prepare(tokenizer_overrides)
        prior_config = config.load_config("prior-demo", (UNLIMITED_STEPS, *prior_overrides))
        prior = pipeline.train(prior_config, "prior", pipeline.token_tables)
        # DISTS would take longer than the training.
        metrics = [name for name in METRICS if name != "dists"]
        return _compare(prior, images, out, metrics)


def compare_model(model: str, images: Path | None, out: Path) -> dict[str, Any]:
    """Compare a trained model with standard codecs, in all metrics.

    Args:
        model: model folder of a prior, or of a tokenizer.
        images, out: see `run_demo`.

    Returns:
        The results of `evaluate_compression`.

    Raises:
        ValueError: there is no such model.
    """
    from bsq_ray.evaluation.compression.distortion import METRICS
    from bsq_ray.model_folder import read_model_header
    from bsq_ray.runtime.ray_session import ray_session

    read_model_header(model)  # raises before images are collected
    images = images or _collect_images(out)
    with ray_session():
        return _compare(model, images, out, METRICS)


def _collect_images(out: Path) -> Path:
    from bsq_ray.samples.wallpapers import collect_wallpapers

    return collect_wallpapers(out / "wallpapers", out / "packages")


def _compare(model: str, images: Path, out: Path, metrics: Sequence[str]) -> dict[str, Any]:
    from bsq_ray.evaluation.compression.evaluate_compression import evaluate_compression

    log(f"compressing {images} with every codec")
    return evaluate_compression(model, str(images), str(out / "evaluation"), workers=WORKERS, metrics=metrics)
