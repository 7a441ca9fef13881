"""Find images or clips in a folder, and recognize the data sets Kodak, MCL-JCV and UVG by their file names.

    kodim01.png … kodim24.png                               Kodak
    videoSRC01_1920x1080_30.mp4|.yuv … videoSRC30…          MCL-JCV
    Beauty_1920x1080_120fps_420_8bit_YUV.yuv|.y4m|.mp4 …    UVG, the seven sequences that papers use
    videoSRC01…/im00001.png …, Beauty…/…                    clips of MCL-JCV or UVG as folders of frames

Subfolders are searched. Any other folder is a data set of all its images or all its clips, named by its URL.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Literal

from bsq_ray import storage
from bsq_ray.data.file_list import find_files
from bsq_ray.evaluation.compression.clip_files import CLIP_SUFFIXES
from bsq_ray.media.images import IMAGE_SUFFIXES

_UVG = "Beauty|Bosphorus|HoneyBee|Jockey|ReadyS(?:teady|et)Go|ShakeNDry|YachtRide"
# Name, kind, number of items, and pattern of the names of its files or folders of frames.
_KNOWN_DATASETS: tuple[tuple[str, Literal["images", "clips"], int, str], ...] = (
    ("Kodak", "images", 24, r"kodim\d\d"),
    ("MCL-JCV", "clips", 30, r"videoSRC\d\d"),
    ("UVG", "clips", 7, rf"(?:{_UVG})(?![a-z])"),
)


@dataclass(frozen=True)
class BenchmarkDataset:
    """Images or clips for a comparison of codecs.

    Attributes:
        name: "Kodak", "MCL-JCV" or "UVG", with the number of items if some are missing; otherwise the folder's URL.
        kind: "images" or "clips".
        items: URL of each image or clip by its path in the folder; for a clip stored as frames, the URL of its folder.
        ignored: one line per kind of ignored entry, with the number of entries.
    """

    name: str
    kind: Literal["images", "clips"]
    items: dict[str, str]
    ignored: tuple[str, ...] = ()


def find_dataset(url: str) -> BenchmarkDataset:
    """Find the images or clips in a folder and its subfolders.

    Raises:
        ValueError: the folder does not exist, or contains neither images nor clips, or both.
    """
    files, ignored = find_files(url, "images", IMAGE_SUFFIXES + CLIP_SUFFIXES)
    paths = [file.name for file in files]
    frames = [
        path for path in paths if _has_suffix(path, IMAGE_SUFFIXES) and _match_dataset(posixpath.dirname(path), "clips")
    ]
    clips = [path for path in paths if _has_suffix(path, CLIP_SUFFIXES)] + sorted(
        {posixpath.dirname(path) for path in frames}
    )
    images = [path for path in paths if _has_suffix(path, IMAGE_SUFFIXES) and path not in frames]
    if images and clips:
        raise ValueError(f"{url} contains images ({images[0]}, …) and clips ({clips[0]}, …); pass a folder of one kind")
    if not images and not clips:
        raise ValueError("; ".join([f"{url} contains no images and no clips", *ignored.describe()]))
    kind: Literal["images", "clips"] = "clips" if clips else "images"
    item_paths = clips or images
    items = {path: storage.join(url, path) for path in item_paths}
    return BenchmarkDataset(_dataset_name(url, item_paths, kind), kind, items, tuple(ignored.describe()))


def _dataset_name(url: str, paths: list[str], kind: Literal["images", "clips"]) -> str:
    sets = {_match_dataset(path, kind) for path in paths}
    for name, _, count, _ in _KNOWN_DATASETS:
        if sets == {name}:
            return name if len(paths) == count else f"{name} ({len(paths)} of {count})"
    return url


def _match_dataset(path: str, kind: Literal["images", "clips"]) -> str | None:
    basename = posixpath.basename(path)
    return next(
        (name for name, each_kind, _, pattern in _KNOWN_DATASETS if each_kind == kind and re.match(pattern, basename)),
        None,
    )


def _has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.lower().endswith(suffixes)
