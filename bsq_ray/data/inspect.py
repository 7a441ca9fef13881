"""A look at a packed data set: counts, sizes, whether the files are whole, and a contact sheet."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.shard_reader import ShardFiles, decode_blob, fetch_encoded
from bsq_ray.data.transforms import eval_transform
from bsq_ray.media.video_reader import read_frames

_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_TILE, _SHEET_GAP = 8, 4, 96, 4
# Image sizes are measured on at most this many samples, spread over the data set.
_MAX_MEASURED = 1000
# So many files are in memory at once.
_BATCH_SIZE = 32


@dataclass
class Inspection:
    """What a data set holds.

    Attributes:
        manifest: the data set.
        per_class: images or videos of each class, by name.
        widths, heights: least, median and greatest of the measured images, pixels.
        measured: how many images or videos were opened for that.
        frames: least, median and greatest number of frames of all videos.
        seconds: of all videos together.
        rates: frame rates of the videos, in words.
        faults: what is wrong with shards, images or videos.
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
    """Reads the manifest, compares every shard with it, measures images, and draws a contact sheet.

    Args:
        url: folder of the shards.
        sheet: where the contact sheet PNG is written; None draws none.

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
                f"{shard.name} is not the file that was packed: it has {len(content)} bytes, the manifest says "
                f"{shard.bytes}" + ("" if len(content) != shard.bytes else " but another checksum")
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
        storage.write_bytes(sheet_url, _contact_sheet(tiles))
    return result


def _iter_images(manifest: Manifest, samples: list[int]) -> Iterator[Image.Image | str]:
    """Images, or the middle frames of videos; what is wrong stands in the place of one that cannot be read."""
    read = _read_images if manifest.kind == "images" else _middle_frames
    for first in range(0, len(samples), _BATCH_SIZE):
        yield from read(manifest, samples[first : first + _BATCH_SIZE])


def _read_images(manifest: Manifest, samples: Sequence[int]) -> Iterator[Image.Image | str]:
    for sample, blob in zip(samples, fetch_encoded(manifest, samples), strict=True):
        shard, index = manifest.locate(sample)
        try:
            yield decode_blob(blob, shard.sizes[index], None)
        except ValueError as error:
            yield f"{shard.name}: {shard.keys[index]}: {error}"


def _middle_frames(manifest: Manifest, samples: Sequence[int]) -> Iterator[Image.Image | str]:
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


def _contact_sheet(tiles: list[np.ndarray]) -> bytes:
    """PNG of square tiles (3, S, S) on white."""
    columns = min(_SHEET_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    pitch = _SHEET_TILE + _SHEET_GAP
    sheet = Image.new("RGB", (columns * pitch + _SHEET_GAP, rows * pitch + _SHEET_GAP), "white")
    for number, tile in enumerate(tiles):
        corner = (number % columns * pitch + _SHEET_GAP, number // columns * pitch + _SHEET_GAP)
        sheet.paste(Image.fromarray(tile.transpose(1, 2, 0)), corner)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
