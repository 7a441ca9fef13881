"""Inspect a packed data set: counts, sizes, integrity of the files, and a contact sheet."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.shard_reader import ShardFiles, decode_blob, fetch_encoded
from bsq_ray.data.transforms import eval_transform
from bsq_ray.media.images import encode_png
from bsq_ray.media.video_reader import read_frames

_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_TILE, _SHEET_GAP = 8, 4, 96, 4
# Maximum number of samples to decode, evenly spaced over the data set.
_MAX_MEASURED = 1000
# Files fetched together.
_BATCH_SIZE = 32


@dataclass
class Inspection:
    """Statistics and errors of a data set.

    Attributes:
        manifest: manifest of the data set.
        class_counts: number of images or videos of each class, by name.
        widths, heights: minimum, median and maximum over the decoded images, in pixels.
        num_measured: number of images or videos that were decoded.
        frame_counts: minimum, median and maximum number of frames over all videos.
        total_duration_s: total duration of all videos in seconds.
        frame_rates: most common frame rates with their counts, as text.
        errors: messages about damaged shards, images or videos.
    """

    manifest: Manifest
    class_counts: dict[str, int]
    widths: tuple[int, int, int] = (0, 0, 0)
    heights: tuple[int, int, int] = (0, 0, 0)
    num_measured: int = 0
    frame_counts: tuple[int, int, int] = (0, 0, 0)
    total_duration_s: float = 0.0
    frame_rates: str = ""
    errors: list[str] = field(default_factory=list)


def inspect_shards(url: str, sheet_url: str | None = None) -> Inspection:
    """Verify every shard against the manifest, measure images, and write a contact sheet.

    Args:
        url: folder of the shards.
        sheet_url: PNG file of the contact sheet; None writes none.

    Raises:
        ValueError: the folder is not a packed data set.
    """
    manifest = read_manifest(url)
    labels = Counter(label for shard in manifest.shards for label in shard.labels)
    result = Inspection(manifest, {manifest.classes[label]: labels[label] for label in sorted(labels)})
    for shard in manifest.shards:
        try:
            content = storage.read_bytes(storage.join(url, shard.name))
        except ValueError as error:
            result.errors.append(str(error))
            continue
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            result.errors.append(
                f"{shard.name} does not match the manifest: "
                + (
                    "its checksum differs"
                    if len(content) == shard.bytes
                    else f"it has {len(content)} bytes instead of {shard.bytes}"
                )
            )
    samples = np.unique(np.linspace(0, manifest.num_samples - 1, _MAX_MEASURED).astype(int)).tolist()
    sizes, tiles = [], []
    sheet_positions = set(
        np.unique(np.linspace(0, len(samples) - 1, _SHEET_COLUMNS * _SHEET_ROWS).astype(int)).tolist()
    )
    for position, image in enumerate(_iter_images(manifest, samples)):
        if isinstance(image, str):
            result.errors.append(image)
            continue
        sizes.append(image.size)
        if position in sheet_positions:
            tiles.append(eval_transform(image, _SHEET_TILE, "lanczos"))
    if sizes:
        widths, heights = np.array(sizes).T
        result.widths, result.heights = _min_median_max(widths), _min_median_max(heights)
        result.num_measured = len(sizes)
    videos = [video for shard in manifest.shards for video in shard.videos]
    if videos:
        result.frame_counts = _min_median_max(np.array([video.frames for video in videos]))
        result.total_duration_s = sum(video.frames / video.fps for video in videos)
        rates = Counter(f"{video.fps:.4g}" for video in videos)
        result.frame_rates = ", ".join(f"{rate} frames/s ({count})" for rate, count in rates.most_common(4))
    if sheet_url is not None and tiles:
        storage.write_bytes(sheet_url, _encode_contact_sheet(tiles))
    return result


def _iter_images(manifest: Manifest, samples: list[int]) -> Iterator[Image.Image | str]:
    """Yield images, or the middle frames of videos; yield an error message for each unreadable file."""
    read = _read_images if manifest.kind == "images" else _read_middle_frames
    for first in range(0, len(samples), _BATCH_SIZE):
        yield from read(manifest, samples[first : first + _BATCH_SIZE])


def _read_images(manifest: Manifest, samples: Sequence[int]) -> Iterator[Image.Image | str]:
    for sample, blob in zip(samples, fetch_encoded(manifest, samples), strict=True):
        shard, index = manifest.locate(sample)
        try:
            yield decode_blob(blob, shard.sizes[index], None)
        except ValueError as error:
            yield f"{shard.name}: {shard.keys[index]}: {error}"


def _read_middle_frames(manifest: Manifest, samples: Sequence[int]) -> Iterator[Image.Image | str]:
    locations = [manifest.locate(sample) for sample in samples]
    files = ShardFiles(manifest, locations)
    for shard, index in locations:
        video = shard.videos[index]
        try:
            with files.open(shard, index) as file:
                yield from read_frames(file, video, video.frames // 2, 1, 1)
        except ValueError as error:
            yield f"{shard.name}: {shard.keys[index]}: {error}"


def _min_median_max(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _encode_contact_sheet(tiles: list[np.ndarray]) -> bytes:
    """Return a PNG of square tiles (3, S, S) on a white background."""
    columns = min(_SHEET_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    pitch = _SHEET_TILE + _SHEET_GAP
    sheet = Image.new("RGB", (columns * pitch + _SHEET_GAP, rows * pitch + _SHEET_GAP), "white")
    for number, tile in enumerate(tiles):
        corner = (number % columns * pitch + _SHEET_GAP, number // columns * pitch + _SHEET_GAP)
        sheet.paste(Image.fromarray(tile.transpose(1, 2, 0)), corner)
    return encode_png(sheet)
