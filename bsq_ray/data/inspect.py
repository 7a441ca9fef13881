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
from bsq_ray.data.sample_index import ShardRow
from bsq_ray.data.shard_reader import ShardFiles, decode_blob, fetch_located, locate_samples
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
    counts_C = np.zeros(len(manifest.classes), np.int64)
    result = Inspection(manifest, {})
    for number in range(manifest.num_shards):
        row = manifest.shard_row(number)
        try:
            counts_C += np.bincount(manifest.shard(number).rows.column("label").to_numpy(), minlength=len(counts_C))
            result.errors += _check_shard(url, row, manifest.has_content_digests)
        except ValueError as error:
            result.errors.append(str(error))
    result.class_counts = {manifest.classes[label]: int(counts_C[label]) for label in np.flatnonzero(counts_C)}
    samples = np.unique(np.linspace(0, manifest.num_samples - 1, _MAX_MEASURED).astype(int)).tolist()
    sizes, tiles = [], []
    sheet_positions = set(
        np.unique(np.linspace(0, len(samples) - 1, _SHEET_COLUMNS * _SHEET_ROWS).astype(int)).tolist()
    )
    for position, image in enumerate(iter_images(manifest, samples)):
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
    if manifest.kind == "videos":
        result.frame_counts = _min_median_max(manifest.num_frames)
        rates = Counter[str]()
        for shard in manifest.shards:
            videos = shard.rows.column("video")
            frames_P, fps_P = videos.field("frames").to_numpy(), videos.field("fps").to_numpy()
            result.total_duration_s += float((frames_P / fps_P).sum())
            rates.update(f"{fps:.4g}" for fps in fps_P)
        result.frame_rates = ", ".join(f"{rate} frames/s ({count})" for rate, count in rates.most_common(4))
    if sheet_url is not None and tiles:
        storage.write_bytes(sheet_url, _encode_contact_sheet(tiles))
    return result


def _check_shard(url: str, row: ShardRow, has_content_digest: bool) -> list[str]:
    """Return an error message if the content of a shard is not that of the manifest."""
    content = storage.read_bytes(storage.join(url, row.name))
    if len(content) != row.bytes:
        return [f"{row.name} does not match the manifest: it has {len(content)} bytes instead of {row.bytes}"]
    if has_content_digest and hashlib.sha256(content).hexdigest() != row.digest:
        return [f"{row.name} does not match the manifest: its checksum differs"]
    return []


def iter_images(
    manifest: Manifest, samples: Sequence[int], short_side: int | None = None
) -> Iterator[Image.Image | str]:
    """Yield images, or the middle frames of videos; yield an error message for each unreadable file.

    Args:
        manifest: the data set.
        samples: numbers of the samples through all shards.
        short_side: size to which the caller will shrink the images, see `decode_blob`; None decodes them in full.
    """
    for first in range(0, len(samples), _BATCH_SIZE):
        batch = samples[first : first + _BATCH_SIZE]
        if manifest.kind == "images":
            yield from _read_images(manifest, batch, short_side)
        else:
            yield from _read_middle_frames(manifest, batch)


def _read_images(manifest: Manifest, samples: Sequence[int], short_side: int | None) -> Iterator[Image.Image | str]:
    locations = locate_samples(manifest, samples)
    for (shard, index), blob in zip(locations, fetch_located(manifest.url, locations), strict=True):
        entry = shard.entry(index)
        try:
            yield decode_blob(blob, entry.size, short_side)
        except ValueError as error:
            yield f"{shard.name}: {entry.key}: {error}"


def _read_middle_frames(manifest: Manifest, samples: Sequence[int]) -> Iterator[Image.Image | str]:
    locations = locate_samples(manifest, samples)
    files = ShardFiles(manifest.url, locations)
    for shard, index in locations:
        video = shard.video(index)
        try:
            with files.open(shard, index) as file:
                yield from read_frames(file, video, video.frames // 2, 1, 1)
        except ValueError as error:
            yield f"{shard.name}: {shard.key(index)}: {error}"


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
