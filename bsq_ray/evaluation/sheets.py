"""Sheets of drawn images: one row for each class."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _LABEL = 96, 4, 150


def class_sheet(tiles: Sequence[np.ndarray], labels: Sequence[int], names: Sequence[str], columns: int) -> bytes:
    """PNG with a row for each class that occurs: its name and its first images.

    Args:
        tiles: uint8 (3, H, W).
        labels: class of each.
        names: of the classes.
        columns: images of a class at most.
    """
    rows = {label: [t for t, its in zip(tiles, labels, strict=True) if its == label] for label in sorted(set(labels))}
    width = _LABEL + max(min(columns, len(row)) for row in rows.values()) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_TILE + _GAP) + _GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, (label, row) in enumerate(rows.items()):
        top = _GAP + place * (_TILE + _GAP)
        name = names[label] if label < len(names) else "any class"
        canvas.text((_GAP, top + _TILE // 2 - 8), name[:18], fill="black", font=font)
        for column, pixels_CHW in enumerate(row[:columns]):
            tile = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
            method = Image.Resampling.NEAREST if tile.width < _TILE else Image.Resampling.LANCZOS
            sheet.paste(tile.resize((_TILE, _TILE), method), (_LABEL + column * (_TILE + _GAP), top))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
