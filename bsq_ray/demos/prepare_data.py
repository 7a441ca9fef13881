"""Data preparation of the demos: kinds of samples, split into training and held-out files, packing."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The training time limits the run of a demo, not the number of steps of its preset.
UNLIMITED_STEPS = "training.steps=1000000"


@dataclass(frozen=True)
class SampleSet:
    """A kind of samples and its settings in a demo.

    Attributes:
        name: name in messages, and of the folder.
        kind: "images" or "videos", as in the data commands.
        preset: preset of the tokenizer.
        max_side: longest side in the shards, pixels.
        min_files: smallest number of files for a training and an evaluation.
    """

    name: str
    kind: str
    preset: str
    max_side: int
    min_files: int


PHOTOS = SampleSet("photos", "images", "demo", 256, 10)
CLIPS = SampleSet("clips", "videos", "demo-video", 176, 2)


def split_by_content(files: Iterable[Path], train: Path, held_out: Path, held_out_every: int) -> None:
    """Copy files into two folders: every `held_out_every`-th in the order of SHA-256 is held out.

    Identical files are copied once. A near-duplicate of a held-out image or clip is not copied, so that the training
    data contains no held-out content. Unreadable files are skipped and logged.
    """
    by_digest: dict[str, Path] = {}
    for path in files:
        try:
            by_digest[hashlib.sha256(path.read_bytes()).hexdigest()] = path
        except OSError as error:
            log(f"ignored {path}: {error.strerror}")
    ordered = sorted(by_digest.items())
    held_out_files = ordered[::held_out_every]
    training_files = [item for index, item in enumerate(ordered) if index % held_out_every]
    copies = _near_duplicates([path for _, path in training_files], [path for _, path in held_out_files])
    if copies:
        log(f"not used for training, near-duplicates of held-out files: {', '.join(map(str, sorted(copies)))}")
    for folder, selected in ((train, training_files), (held_out, held_out_files)):
        folder.mkdir(parents=True, exist_ok=True)
        for digest, path in selected:
            if path not in copies:
                shutil.copy(path, folder / f"{digest[:12]}{path.suffix.lower()}")


def _near_duplicates(files: list[Path], others: list[Path]) -> set[Path]:
    """Return the files that are near-duplicates of one of `others`; files that cannot be decoded are never returned."""
    from bsq_ray.media.near_duplicates import near_duplicate_pairs, stack_vectors

    (vectors_ND, rows_N), (others_MD, _) = (stack_vectors(map(_file_vector, paths)) for paths in (files, others))
    return {files[rows_N[n]] for n, _, _ in near_duplicate_pairs(vectors_ND, others_MD)}


def _file_vector(path: Path) -> np.ndarray | None:
    """Return the vector of an image, or of the first frame of a clip."""
    from PIL import Image

    from bsq_ray.media.images import IMAGE_SUFFIXES, read_image
    from bsq_ray.media.near_duplicates import thumbnail_vector
    from bsq_ray.media.video_reader import read_video

    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return thumbnail_vector(read_image(str(path)))
        video = read_video(str(path))
        try:
            return thumbnail_vector(Image.fromarray(next(video.frames)))
        finally:
            video.frames.close()
    except (ValueError, StopIteration):
        return None


def pack_if_needed(folder: Path, dest: Path, sample_set: SampleSet = PHOTOS, num_workers: int | None = None) -> str:
    """Pack a folder into `dest` unless `dest` already contains a manifest; return the URL of `dest`.

    Args:
        num_workers: number of parallel Ray tasks; 0 packs in this process, None uses all CPUs of the cluster.
    """
    from bsq_ray.data.manifest import MANIFEST_FILE
    from bsq_ray.data.pack import PackOptions, pack_images, pack_videos

    if not (dest / MANIFEST_FILE).exists():
        pack = pack_images if sample_set.kind == "images" else pack_videos
        report = pack(str(folder), str(dest), PackOptions(max_side=sample_set.max_side, num_workers=num_workers))
        log(f"packed {report.manifest.num_samples} {sample_set.name} into {dest}")
        for line in report.damaged_files + report.too_short_files:
            log(f"skipped {line}")
    return str(dest)


def log(line: str) -> None:
    """Print a progress line on stderr; bytes of file names that are not UTF-8 are escaped."""
    print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
