"""Folders of images or clips to compress, and the published sets among them: Kodak, MCL-JCV, UVG.

    kodim01.png … kodim24.png                               Kodak
    videoSRC01_1920x1080_30.mp4|.yuv … videoSRC30…          MCL-JCV
    Beauty_1920x1080_120fps_420_8bit_YUV.yuv|.y4m|.mp4 …    UVG, the seven sequences that papers use
    videoSRC01…/im00001.png …, Beauty…/…                    the same as folders of frames

Files may lie in folders of their own. Anything else is a set without a name, of all images or all clips that it holds.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Literal

from bsq_ray import storage
from bsq_ray.data.transforms import IMAGE_SUFFIXES
from bsq_ray.evaluation.compression.clip_files import CLIP_SUFFIXES

_UVG = "Beauty|Bosphorus|HoneyBee|Jockey|ReadyS(?:teady|et)Go|ShakeNDry|YachtRide"
# Name, what it holds, how many, and how its files or folders of frames are called.
_KNOWN_DATASETS: tuple[tuple[str, Literal["images", "clips"], int, str], ...] = (
    ("Kodak", "images", 24, r"kodim\d\d"),
    ("MCL-JCV", "clips", 30, r"videoSRC\d\d"),
    ("UVG", "clips", 7, rf"(?:{_UVG})(?![a-z])"),
)


@dataclass(frozen=True)
class BenchmarkDataset:
    """What is compressed.

    Attributes:
        name: "Kodak", "MCL-JCV", "UVG", with what is missing of it, or the folder's.
        kind: "images" or "clips".
        items: URL of each by its name; of a clip as frames, its folder.
    """

    name: str
    kind: Literal["images", "clips"]
    items: dict[str, str]


def find_dataset(url: str) -> BenchmarkDataset:
    """Looks through a folder and those in it.

    Raises:
        ValueError: it is missing, holds neither images nor clips, or both.
    """
    fs, root = storage.filesystem(url)
    with storage.translate_errors(url, "read"):
        if not fs.isdir(root):
            raise ValueError(f"{url} is not a folder" if fs.exists(root) else f"{url} does not exist")
        paths = sorted(posixpath.relpath(path, root) for path in fs.find(root))
    frames = [
        path for path in paths if _has_suffix(path, IMAGE_SUFFIXES) and _match_dataset(posixpath.dirname(path), "clips")
    ]
    clips = [path for path in paths if _has_suffix(path, CLIP_SUFFIXES)] + sorted(
        {posixpath.dirname(path) for path in frames}
    )
    images = [path for path in paths if _has_suffix(path, IMAGE_SUFFIXES) and path not in frames]
    if images and clips:
        raise ValueError(f"{url} holds images ({images[0]}, …) and clips ({clips[0]}, …); give a folder of one kind")
    if not images and not clips:
        raise ValueError(f"{url} holds no images and no clips")
    kind: Literal["images", "clips"] = "clips" if clips else "images"
    item_paths = clips or images
    return BenchmarkDataset(
        _dataset_name(url, item_paths, kind), kind, {path: storage.join(url, path) for path in item_paths}
    )


def _dataset_name(url: str, paths: list[str], kind: Literal["images", "clips"]) -> str:
    sets = {_match_dataset(path, kind) for path in paths}
    for name, _, count, _ in _KNOWN_DATASETS:
        if sets == {name}:
            return name if len(paths) == count else f"{name} ({len(paths)} of {count})"
    return url


def _match_dataset(path: str, kind: Literal["images", "clips"]) -> str | None:
    basename = posixpath.basename(path)
    return next(
        (name for name, its, _, pattern in _KNOWN_DATASETS if its == kind and re.match(pattern, basename)), None
    )


def _has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.lower().endswith(suffixes)
