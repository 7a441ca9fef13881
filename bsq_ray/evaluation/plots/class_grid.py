"""Plot generated images as a grid with one row per class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bsq_ray.evaluation.plots.image_encoding import encode_png, image_from_pixels

_TILE, _GAP, _LABEL = 96, 4, 150


class ClassSheet:
    """Grid with the name and the first images of each class; keeps thumbnails of these images only.

    Args:
        names: names of the classes.
        columns: maximum number of images of a class.
    """

    def __init__(self, names: Sequence[str], columns: int) -> None:
        self._names, self._columns = names, columns
        self._rows: dict[int, list[Image.Image]] = {}

    def add(self, label: int, pixels_CHW: np.ndarray) -> None:
        """Add an image of a class, uint8 (3, H, W); it is ignored if the row is full."""
        row = self._rows.setdefault(label, [])
        if len(row) < self._columns:
            tile = image_from_pixels(pixels_CHW)
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            row.append(tile.resize((_TILE, _TILE), method))

    def png(self) -> bytes:
        """Return the grid as a PNG file; classes without images have no row."""
        width = _LABEL + max(len(row) for row in self._rows.values()) * (_TILE + _GAP) + _GAP
        sheet = Image.new("RGB", (width, len(self._rows) * (_TILE + _GAP) + _GAP), "white")
        canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
        for index, (label, row) in enumerate(sorted(self._rows.items())):
            top = _GAP + index * (_TILE + _GAP)
            name = self._names[label] if label < len(self._names) else "any class"
            canvas.text((_GAP, top + _TILE // 2 - 8), name[:18], fill="black", font=font)
            for column, tile in enumerate(row):
                sheet.paste(tile, (_LABEL + column * (_TILE + _GAP), top))
        return encode_png(sheet)
