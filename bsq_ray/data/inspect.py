"""A look at a packed data set: counts, sizes, whether the files are whole, and a contact sheet."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.images import evaluation_image
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.read import decode, fetch

_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_TILE, _SHEET_GAP = 8, 4, 96, 4
# Image sizes are measured on at most this many samples, spread over the data set.
_MEASURED = 1000


@dataclass
class Inspection:
    """What a data set holds.

    Attributes:
        manifest: the data set.
        per_class: images of each class, by name.
        widths, heights: least, median and greatest of the measured images, pixels.
        measured: how many images were opened for that.
        faults: what is wrong with shards or images.
    """

    manifest: Manifest
    per_class: dict[str, int]
    widths: tuple[int, int, int] = (0, 0, 0)
    heights: tuple[int, int, int] = (0, 0, 0)
    measured: int = 0
    faults: list[str] = field(default_factory=list)


def inspect_shards(url: str, sheet: str | None = None) -> Inspection:
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
            result.faults.append(str(error))
            continue
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            result.faults.append(
                f"{shard.name} is not the file that was packed: it has {len(content)} bytes, the manifest says "
                f"{shard.bytes}" + ("" if len(content) != shard.bytes else " but another checksum")
            )
    samples = np.unique(np.linspace(0, manifest.samples - 1, _MEASURED).astype(int)).tolist()
    sizes, tiles = [], []
    on_sheet = set(np.unique(np.linspace(0, len(samples) - 1, _SHEET_COLUMNS * _SHEET_ROWS).astype(int)).tolist())
    for place, (sample, blob) in enumerate(zip(samples, fetch(manifest, samples), strict=True)):
        shard, index = manifest.locate(sample)
        try:
            image = decode(blob, shard.sizes[index], None)
        except ValueError as error:
            result.faults.append(f"{shard.name}: {shard.keys[index]}: {error}")
            continue
        sizes.append(image.size)
        if place in on_sheet:
            tiles.append(evaluation_image(image, _SHEET_TILE, "lanczos"))
    if sizes:
        widths, heights = np.array(sizes).T
        result.widths, result.heights = _spread(widths), _spread(heights)
        result.measured = len(sizes)
    if sheet is not None and tiles:
        storage.write_bytes(sheet, _contact_sheet(tiles))
    return result


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _contact_sheet(tiles: list[np.ndarray]) -> bytes:
    """PNG of square tiles (3, S, S) on white."""
    columns = min(_SHEET_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    pitch = _SHEET_TILE + _SHEET_GAP
    sheet = Image.new("RGB", (columns * pitch + _SHEET_GAP, rows * pitch + _SHEET_GAP), "white")
    for number, tile in enumerate(tiles):
        place = (number % columns * pitch + _SHEET_GAP, number // columns * pitch + _SHEET_GAP)
        sheet.paste(Image.fromarray(tile.transpose(1, 2, 0)), place)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
