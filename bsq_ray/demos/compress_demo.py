"""Compression demo.

images ─▶ tokenizer ─▶ token tables ─▶ prior ─▶ rate and distortion on held-out images
"""

from __future__ import annotations

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
    from bsq_ray.evaluation.compression.evaluate_compression import evaluate_compression
    from bsq_ray.runtime.ray_session import ray_session

    pipeline = TokenPipeline(train_images, out, minutes, PHOTO_DETAILS)
    if images is None:
        from bsq_ray.samples.wallpapers import collect_wallpapers

        images = collect_wallpapers(out / "wallpapers", out / "packages")
    with ray_session():
        pipeline.prepare(tokenizer_overrides)
        prior_config = config.load_config("prior-demo", (UNLIMITED_STEPS, *prior_overrides))
        prior = pipeline.train(prior_config, "prior", pipeline.token_tables)
        log(f"compressing {images} with every codec")
        # DISTS would take longer than the training.
        metrics = [name for name in METRICS if name != "dists"]
        return evaluate_compression(prior, str(images), str(out / "evaluation"), workers=WORKERS, metrics=metrics)
