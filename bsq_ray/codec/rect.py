"""Rectangles of pixels or tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Rect:
    """Rows `top` to `bottom` and columns `left` to `right`; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.right - self.left

    def contains(self, other: Rect) -> bool:
        """Return whether the other rectangle is not empty and lies inside this one."""
        rows_inside = self.top <= other.top < other.bottom <= self.bottom
        return rows_inside and self.left <= other.left < other.right <= self.right

    def intersect(self, other: Rect) -> Rect:
        """Return the common part."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Rect(top, left, min(self.bottom, other.bottom), min(self.right, other.right))

    def shift(self, rows: int, columns: int) -> Rect:
        """Move the rectangle down and to the right."""
        return Rect(self.top + rows, self.left + columns, self.bottom + rows, self.right + columns)

    def relative_to(self, origin: Rect) -> Rect:
        """Return the rectangle in coordinates whose origin is the top left corner of `origin`."""
        return self.shift(-origin.top, -origin.left)

    def grow(self, margin: int) -> Rect:
        """Extend the rectangle in all four directions."""
        return Rect(self.top - margin, self.left - margin, self.bottom + margin, self.right + margin)

    def scale(self, factor: int) -> Rect:
        """Multiply all coordinates: from tiles to pixels."""
        return Rect(self.top * factor, self.left * factor, self.bottom * factor, self.right * factor)

    def cover(self, size: int) -> Rect:
        """Return the smallest rectangle of cells of `size` that covers this one: from pixels to tiles."""
        return Rect(self.top // size, self.left // size, -(-self.bottom // size), -(-self.right // size))

    def blocks(self, size: int) -> Iterator[Rect]:
        """Yield blocks of `size` rows and columns that cover the rectangle; the last ones may extend beyond it."""
        for top in range(self.top, self.bottom, size):
            for left in range(self.left, self.right, size):
                yield Rect(top, left, top + size, left + size)

    def slices(self) -> tuple[slice, slice]:
        """Return the indices of rows and columns of an array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)
