"""Whole paths in one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    images: Annotated[Path | None, typer.Option(help="Your own folder of photographs.")] = None,
    video: Annotated[bool, typer.Option("--video", help="Train a video tokenizer on clips instead.")] = False,
    videos: Annotated[Path | None, typer.Option(help="Your own folder of clips, with --video.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything; default quickstart or quickstart-video.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 6.0,
) -> None:
    """Train a small tokenizer on real photographs or clips and show what it can do."""
    from bsq_ray.demos.quickstart import CLIPS, PHOTOS, run_quickstart

    if (videos and not video) or (images and video):
        raise ValueError("--images is a folder of photographs, --video --videos one of clips; give one of them")
    if video:
        result = run_quickstart(videos, out or Path("quickstart-video"), minutes, sample_set=CLIPS)
    else:
        result = run_quickstart(images, out or Path("quickstart"), minutes, sample_set=PHOTOS)
    print(result.summary)


def demo_generate(
    images: Annotated[Path | None, typer.Option(help="Your own folder, with a subfolder for each class.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-generate"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 16.0,
) -> None:
    """Train a tokenizer and a masked language model on labelled photographs, and draw images of the classes."""
    from bsq_ray.demos.generate_demo import run_demo

    print(run_demo(images, out, minutes).summary)


def demo_compress(
    images: Annotated[Path | None, typer.Option(help="Your own folder of photographs to compress.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo-compress"),
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 16.0,
    train_images: Annotated[Path | None, typer.Option(help="Photographs to train on, in class folders.")] = None,
) -> None:
    """Train a tokenizer and a prior, and compress unseen photographs beside the standard codecs."""
    from bsq_ray.demos.compress_demo import run_demo
    from bsq_ray.evaluation.compression.compression_report import compression_markdown

    print(compression_markdown(run_demo(images, out, minutes, train_images)))
    print(f"plot: {out}/evaluation/curves.png\npictures: {out}/evaluation/pictures.png")
