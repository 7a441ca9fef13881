"""Find images or clips in a folder, and recognize published data sets by the names of their files and folders.

    kodim01.png … kodim24.png                               Kodak
    CLIC2020Professional_test/… and CLIC2020Mobile_test/…   CLIC 2020, test images
    professional_valid_2020/… and mobile_valid_2020/…       CLIC 2020, validation images
    DIV2K_valid_HR/0801.png … 0900.png                      DIV2K, validation images
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

from PIL import Image

from bsq_ray import storage
from bsq_ray.data.file_list import find_files
from bsq_ray.evaluation.compression.clip_files import CLIP_SUFFIXES
from bsq_ray.media.images import IMAGE_SUFFIXES

Kind = Literal["images", "clips"]
_UVG = "Beauty|Bosphorus|HoneyBee|Jockey|ReadyS(?:teady|et)Go|ShakeNDry|YachtRide"
_CLIC_URL = "https://data.vision.ee.ethz.ch/cvl/clic"


@dataclass(frozen=True)
class _PublishedSet:
    """A published data set.

    Attributes:
        name: its name in results.
        kind: "images" or "clips".
        count: number of items.
        file_pattern: regular expression at the start of the names of its files, or of its folders of frames.
        source: page or archive of the publisher.
        folder: name, in lower case, of a folder that contains the files; None if their names are enough.
        longer_side: longer side of all images, pixels; None if they differ.
    """

    name: str
    kind: Kind
    count: int
    file_pattern: str
    source: str
    folder: str | None = None
    longer_side: int | None = None


_PUBLISHED_SETS = (
    _PublishedSet("Kodak", "images", 24, r"kodim\d\d", "https://r0k.us/graphics/kodak", longer_side=768),
    _PublishedSet(
        "CLIC 2020 professional test", "images", 250, "", f"{_CLIC_URL}/test/CLIC2020Professional_test.zip",
        folder="clic2020professional_test",
    ),
    _PublishedSet(
        "CLIC 2020 mobile test", "images", 178, "", f"{_CLIC_URL}/test/CLIC2020Mobile_test.zip",
        folder="clic2020mobile_test",
    ),
    _PublishedSet(
        "CLIC 2020 professional validation", "images", 41, "", f"{_CLIC_URL}/professional_valid_2020.zip",
        folder="professional_valid_2020",
    ),
    _PublishedSet(
        "CLIC 2020 mobile validation", "images", 61, "", f"{_CLIC_URL}/mobile_valid_2020.zip",
        folder="mobile_valid_2020",
    ),
    _PublishedSet(
        "DIV2K validation", "images", 100, r"0(?:80[1-9]|8[1-9]\d|900)\.",
        "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip", folder="div2k_valid_hr", longer_side=2040,
    ),
    _PublishedSet("MCL-JCV", "clips", 30, r"videoSRC\d\d", "https://mcl.usc.edu/mcl-jcv-dataset"),
    _PublishedSet("UVG", "clips", 7, rf"(?:{_UVG})(?![a-z])", "https://ultravideo.fi/dataset.html"),
)  # fmt: skip
# Sets that papers evaluate as one, when a folder contains both.
_UNIONS = {
    "CLIC 2020 test": ("CLIC 2020 professional test", "CLIC 2020 mobile test"),
    "CLIC 2020 validation": ("CLIC 2020 professional validation", "CLIC 2020 mobile validation"),
}


@dataclass(frozen=True)
class BenchmarkDataset:
    """Images or clips for a comparison of codecs.

    Attributes:
        name: name of a published data set, with the number of items if some are missing; otherwise the folder's URL.
        kind: "images" or "clips".
        items: URL of each image or clip by its path in the folder; for a clip stored as frames, the URL of its folder.
        ignored: one line per kind of ignored entry, with the number of entries.
        warnings: differences from the published data set.
    """

    name: str
    kind: Kind
    items: dict[str, str]
    ignored: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def find_dataset(url: str) -> BenchmarkDataset:
    """Find the images or clips in a folder and its subfolders.

    Raises:
        ValueError: the folder does not exist, or contains neither images nor clips, or both. The message names the
            source of a published data set if the folder is named after one.
    """
    try:
        files, ignored = find_files(url, "images", IMAGE_SUFFIXES + CLIP_SUFFIXES)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *_instructions(url)])) from error
    paths = [file.name for file in files]
    frames = [
        path
        for path in paths
        if _has_suffix(path, IMAGE_SUFFIXES) and _match_set(url, posixpath.dirname(path), "clips")
    ]
    clips = [path for path in paths if _has_suffix(path, CLIP_SUFFIXES)] + sorted(
        {posixpath.dirname(path) for path in frames}
    )
    images = [path for path in paths if _has_suffix(path, IMAGE_SUFFIXES) and path not in frames]
    if images and clips:
        raise ValueError(f"{url} contains images ({images[0]}, …) and clips ({clips[0]}, …); pass a folder of one kind")
    if not images and not clips:
        raise ValueError(
            "; ".join([f"{url} contains no images and no clips", *_instructions(url), *ignored.describe()])
        )
    kind: Kind = "clips" if clips else "images"
    items = {path: storage.join(url, path) for path in clips or images}
    matches = [_match_set(url, path, kind) for path in items]
    published = {match.name: match for match in matches if match is not None}
    name = _union_name(tuple(published)) if None not in matches else None
    if name is None:
        return BenchmarkDataset(url, kind, items, tuple(ignored.describe()))
    count = sum(match.count for match in published.values())
    return BenchmarkDataset(
        name if len(items) == count else f"{name} ({len(items)} of {count})",
        kind,
        items,
        tuple(ignored.describe()),
        tuple(_size_warnings(items, next(iter(published.values())))),
    )


def _match_set(url: str, path: str, kind: Kind) -> _PublishedSet | None:
    """Return the published data set that an item belongs to by its name and its folders."""
    *folders, name = f"{url}/{path}".split("/")
    lower_folders = {folder.lower() for folder in folders}
    for each in _PUBLISHED_SETS:
        is_in_folder = each.folder is None or each.folder in lower_folders
        if each.kind == kind and is_in_folder and re.match(each.file_pattern, name):
            return each
    return None


def _union_name(names: tuple[str, ...]) -> str | None:
    """Return the name of one published data set, or of several that form one."""
    if len(names) == 1:
        return names[0]
    return next((union for union, parts in _UNIONS.items() if set(parts) == set(names)), None)


def _size_warnings(items: dict[str, str], published: _PublishedSet) -> list[str]:
    """Return a line if images do not have the published size; unreadable ones are reported when they are compressed."""
    if published.longer_side is None:
        return []
    others = {path: size for path, url in items.items() if (size := _image_size(url)) is not None}
    others = {path: size for path, size in others.items() if max(size) != published.longer_side}
    if not others:
        return []
    path, (width, height) = next(iter(others.items()))
    return [
        f"{len(others)} of {len(items)} images do not have the {published.longer_side} pixels of {published.name} on "
        f"the longer side, such as {path} with {width} x {height}; results are not comparable with published ones"
    ]


def _image_size(url: str) -> tuple[int, int] | None:
    """Return width and height from the header of an image file; None if it cannot be read."""
    try:
        with storage.open_url(url) as file, Image.open(file) as image:
            return image.size
    except (OSError, ValueError):
        return None


def _instructions(url: str) -> list[str]:
    """Return how to get a published data set if a folder is named after it: Kodak, clic2020, DIV2K_valid_HR."""
    name = _simplify(posixpath.basename(url.rstrip("/")))
    exact = [each for each in _PUBLISHED_SETS if each.folder and _simplify(each.folder) == name]
    sets = exact or [each for each in _PUBLISHED_SETS if name.startswith(_simplify(each.name.split()[0]))]
    return [
        f"{each.name} is not included: get its {each.count} {each.kind} from {each.source} and "
        f"{'keep the folder name of the archive' if each.folder else 'keep their file names'}"
        for each in sets
    ]


def _simplify(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.lower().endswith(suffixes)
