"""Commands that run from data to results: quickstart and demos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bsq_ray.cli.extras import require_extra

# Training time of the demos that train two models, minutes.
_MINUTES = 16.0


def quickstart(
    images: Annotated[
        Path | None, typer.Option(help="Folder of images. Default: photos of installed sample packages.")
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Train a video tokenizer on clips.")] = False,
    videos: Annotated[Path | None, typer.Option(help="Folder of clips, with --video.")] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: quickstart or quickstart-video.")] = None,
    minutes: Annotated[float, typer.Option(help="Training time, minutes.")] = 6.0,
) -> None:
    """Train a small tokenizer on images or clips, evaluate it, and write an HTML report."""
    require_extra("quickstart", "all")

    from bsq_ray.demos.prepare_data import CLIPS, PHOTOS
    from bsq_ray.demos.quickstart import run_quickstart

    if (videos and not video) or (images and video):
        raise ValueError(
            "--images excludes --video and --videos; give a folder of images, or --video with a folder of clips"
        )
    if video:
        result = run_quickstart(videos, out or Path("quickstart-video"), minutes, sample_set=CLIPS)
    else:
        result = run_quickstart(images, out or Path("quickstart"), minutes, sample_set=PHOTOS)
    print(result.summary)


def demo_generate(
    images: Annotated[
        Path | None, typer.Option(help="Folder with a subfolder of images for each class. Default: collected photos.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-generate"),
    minutes: Annotated[float, typer.Option(help="Training time, minutes.")] = _MINUTES,
) -> None:
    """Train a tokenizer and a masked language model on labeled images, and generate images of the classes."""
    require_extra("demo-generate", "all")

    from bsq_ray.demos.generate_demo import run_demo

    print(run_demo(images, out, minutes).summary)


def demo_compress(
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to compress. Default: 24 collected images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("demo-compress"),
    minutes: Annotated[float | None, typer.Option(help="Training time, minutes. Default: 16.")] = None,
    train_images: Annotated[
        Path | None, typer.Option(help="Training images, in class folders. Default: collected photos.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Compare this model, such as photo-prior, instead of training one.")
    ] = None,
) -> None:
    """Train a tokenizer and a prior, and compare them with standard codecs on unseen images."""
    require_extra("demo-compress", "all", "bjontegaard", "imagecodecs")

    from bsq_ray.demos.compress_demo import compare_model, run_demo
    from bsq_ray.evaluation.compression.compression_report import compression_markdown

    if model is None:
        results = run_demo(images, out, _MINUTES if minutes is None else minutes, train_images)
    elif minutes is None and train_images is None:
        results = compare_model(model, images, out)
    else:
        raise ValueError("--minutes and --train-images are for training; omit them with --model, which trains nothing")
    print(compression_markdown(results))
    print(f"plot: {out}/evaluation/curves.png\ncomparison: {out}/evaluation/comparison.png")
