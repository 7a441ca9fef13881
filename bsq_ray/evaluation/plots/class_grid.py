"""Sheets of drawn images: one row for each class."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _LABEL = 96, 4, 150


class ClassSheet:
    """A row for each class: its name and its first images. Keeps small copies of those that it shows, and no others.

    Args:
        names: of the classes.
        columns: images of a class at most.
    """

    def __init__(self, names: Sequence[str], columns: int) -> None:
        self._names, self._columns = names, columns
        self._rows: dict[int, list[Image.Image]] = {}

    def add(self, label: int, pixels_CHW: np.ndarray) -> None:
        """An image of a class, uint8."""
        row = self._rows.setdefault(label, [])
        if len(row) < self._columns:
            tile = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            row.append(tile.resize((_TILE, _TILE), method))

    def png(self) -> bytes:
        """The classes that occur, in their order."""
        width = _LABEL + max(len(row) for row in self._rows.values()) * (_TILE + _GAP) + _GAP
        sheet = Image.new("RGB", (width, len(self._rows) * (_TILE + _GAP) + _GAP), "white")
        canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
        for index, (label, row) in enumerate(sorted(self._rows.items())):
            top = _GAP + index * (_TILE + _GAP)
            name = self._names[label] if label < len(self._names) else "any class"
            canvas.text((_GAP, top + _TILE // 2 - 8), name[:18], fill="black", font=font)
            for column, tile in enumerate(row):
                sheet.paste(tile, (_LABEL + column * (_TILE + _GAP), top))
        png = io.BytesIO()
        sheet.save(png, "PNG")
        return png.getvalue()
