"""The record of how a data set was packed: a part of what every measurement on it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Quality of JPEGs and rate factor of H.264 videos that packing encodes again.
JPEG_QUALITY, VIDEO_CRF = 95, 14


@dataclass(frozen=True)
class Packing:
    """A record of how packing changes files before they are stored.

    Attributes:
        max_side: longest side, pixels, to which larger files are shrunk; None keeps every size.
        resize_filter: interpolation of shrinking.
        encoding: format and quality of files that are encoded again.
    """

    max_side: int | None
    resize_filter: str
    encoding: str

    def describe(self) -> str:
        """Return a clause for results, such as "packed with a longer side of at most 256 px (lanczos, …)"."""
        if self.max_side is None:
            return f"packed at their own size ({self.encoding} where a file is encoded again)"
        return f"packed with a longer side of at most {self.max_side} px ({self.resize_filter}, {self.encoding})"


def new_packing(kind: str, max_side: int | None) -> Packing:
    """Return the record of packing images or videos with the settings of this version.

    Args:
        kind: "images" or "videos".
        max_side: see `Packing`.
    """
    encoding = f"JPEG quality {JPEG_QUALITY}, or PNG" if kind == "images" else f"H.264 CRF {VIDEO_CRF}"
    return Packing(max_side, "lanczos", encoding)


def parse_packing(record: Mapping[str, Any] | None) -> Packing | None:
    """Return the record of a manifest; None for shards that another program made.

    Raises:
        TypeError: the record has other fields.
    """
    return None if record is None else Packing(**record)


def describe_packing(packing: Packing | None) -> str:
    """Return a clause for results, see `Packing.describe`."""
    return "shards of another program" if packing is None else packing.describe()
