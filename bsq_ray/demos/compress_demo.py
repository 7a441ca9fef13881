"""The demo of compression: photographs ─▶ tokenizer ─▶ tokens ─▶ prior ─▶ rate and distortion on unseen photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bsq_ray import config
from bsq_ray.demos.demo_tokens import WORKERS, TokenDemo
from bsq_ray.demos.quickstart import UNLIMITED_STEPS, log


def run_demo(
    images: Path | None,
    out: Path,
    minutes: float,
    train_images: Path | None = None,
    tokenizer_overrides: tuple[str, ...] = (),
    prior_overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Trains a tokenizer and a prior, and compares them with the standard codecs; results as `evaluate_compression`.

    Args:
        images: a folder of photographs to compress; None collects 24 wallpapers from packages.
        out: folder for everything.
        minutes: of training, both models together.
        train_images: class folders of photographs to train on; None collects some from packages.
        tokenizer_overrides, prior_overrides: changes of the presets `demo` and `prior-demo`.

    Raises:
        ValueError: there are too few photographs.
    """
    from bsq_ray.evaluation.compression.evaluate_compression import evaluate_compression
    from bsq_ray.runtime.ray_session import ray_session

    demo = TokenDemo(train_images, out, minutes)
    if images is None:
        from bsq_ray.samples.wallpapers import collect_wallpapers

        images = collect_wallpapers(out / "pictures", out / "packages")
    with ray_session():
        demo.prepare(tokenizer_overrides)
        prior = demo.train(config.load_config("prior-demo", (UNLIMITED_STEPS, *prior_overrides)), "prior", demo.tables)
        log(f"compressing {images} with everything")
        return evaluate_compression(prior, str(images), str(out / "evaluation"), WORKERS)
