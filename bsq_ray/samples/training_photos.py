"""Collect photos whose licenses allow publishing a model trained on them, from packages of public registries.

    packages ─▶ photos ─shrunk─▶ not near-duplicates of photos that are evaluated ─▶ folder/SOURCE/NAME.jpg

Photos in packages that do not state the rights of the photos, and drawings, are skipped. The folder can be packed with
`bsq-ray data pack`.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from bsq_ray.media.images import to_srgb
from bsq_ray.media.near_duplicates import near_duplicate_pairs, stack_vectors, thumbnail_vector
from bsq_ray.samples.labeled_photos import collect_labeled_photos, iter_qt_photos
from bsq_ray.samples.package_download import download_package, unpack_debian_package
from bsq_ray.samples.photos import collect_photos
from bsq_ray.samples.wallpapers import collect_wallpapers

MAX_SIDE = 768
# Photos at least this wide contain details that a photo of MAX_SIDE has lost; their quarters are photos of their own.
_MIN_WIDTH_FOR_QUARTERS = 4 * MAX_SIDE // 2
_MIN_SIDE = 128
_FALLBACK_HINT = "or train on your own photos with `bsq-ray data pack` and `bsq-ray train`"
# Groups of the resource "categorization" that are photos.
_PHOTO_GROUPS = ("/fishes", "/monuments", "/tools", "/renewable", "/household")


@dataclass(frozen=True)
class PhotoSource:
    """A package with photos.

    Attributes:
        package: name in its registry.
        license: license of the photos.
        names: names of the photos without suffix; empty for all.
    """

    package: str
    license: str
    names: tuple[str, ...] = ()


SOURCES = (
    PhotoSource("gcompris-qt-data", "GPL-3+, photos from Wikimedia Commons: public domain, CC0, CC BY and CC BY-SA"),
    PhotoSource(
        "plasma-workspace-wallpapers",
        "GPL-2+",
        ("FallenLeaf", "Path", "DarkestHour", "summer_1am", "EveningGlow", "Grey", "Kite", "ColorfulCups",
         "OneStandsOut", "ColdRipple", "BytheWater"),
    ),
    PhotoSource(
        "lomiri-wallpapers-16.04",
        "CC BY-SA 3.0",
        ("Picture_1A_by_freespace", "Picture_0B_by_freespace", "greentock_by_Peter_Nerlich",
         "sunset_by_Aitzol_Berasategi", "free_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal",
         "Bridge_by_Sander_Klootwijk"),
    ),
    PhotoSource("lomiri-wallpapers-20.04", "CC BY-SA 4.0", ("Kleiber_by_Lukas_Baubkus",)),
    PhotoSource(
        "mate-backgrounds",
        "GPL-2+ and CC BY-SA 4.0",
        ("Garden", "Wood", "Aqua", "GreenMeadow", "Blinds", "FreshFlower"),
    ),
    PhotoSource(
        "palapeli-data",
        "GPL-2+, CC0 and GFDL",
        ("cincinnati-bridge", "european-honey-bee", "panther-chameleon-female", "castle-maintenon", "citrus-fruits"),
    ),
    PhotoSource(
        "libjxl-testdata",
        "CC0",
        ("tmshre_riaphotographs_srgb8", "cvo9xd_keong_macan_srgb8", "u76c0g_bliznaca_srgb8"),
    ),
    PhotoSource("@vendure/create", "GPL-3+, photos under the Unsplash license"),
    PhotoSource("scikit-image", "public domain and CC0", ("astronaut", "rocket", "hubble_deep_field")),
)  # fmt: skip


def collect_training_photos(destination: Path, packages: Path) -> tuple[Path, Path]:
    """Write the photos as JPEG to `destination/SOURCE` unless they exist; return (training, held-out) folders.

    Their longest side is at most `MAX_SIDE` pixels. Near-duplicates of the wallpapers that compare codecs, and of the
    held-out photos of the demos, are skipped. The held-out photos are those of the generation demo.

    Args:
        destination: folder of the photos.
        packages: folder in which fetched packages are kept.

    Raises:
        ValueError: a package cannot be fetched.
    """
    complete, held_out = destination / ".complete", packages / "labeled" / "held_out"
    if complete.exists():
        return destination, held_out
    _, held_out = collect_labeled_photos(packages / "labeled", packages)
    evaluated_MD = _evaluated_vectors(held_out, packages)
    known_digests: set[str] = set()
    for source in SOURCES:
        folder = destination / source.package.replace("/", "-").lstrip("@")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _iter_files(source, packages):
            digest = hashlib.sha256(content).hexdigest()
            if digest in known_digests:
                continue
            known_digests.add(digest)
            with Image.open(io.BytesIO(content)) as file:
                image = to_srgb(file)
            vectors_ND, _ = stack_vectors([thumbnail_vector(image)])
            if min(image.size) < _MIN_SIDE or near_duplicate_pairs(vectors_ND, evaluated_MD):
                continue
            for suffix, part in _parts(image):
                part.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
                part.save(folder / f"{name}-{digest[:6]}{suffix}.jpg", quality=92, subsampling=0)
    complete.touch()
    return destination, held_out


def _evaluated_vectors(held_out: Path, packages: Path) -> np.ndarray:
    """Return the vectors of photos that evaluations use."""
    _, quickstart = collect_photos(packages / "quickstart")
    folders = held_out, quickstart, collect_wallpapers(packages / "wallpapers", packages)
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    vectors = []
    for path in paths:
        with Image.open(path) as file:
            vectors.append(thumbnail_vector(to_srgb(file)))
    return stack_vectors(vectors)[0]


def _parts(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Yield the photo, and its quarters if it is large."""
    width, height = image.size
    if width >= _MIN_WIDTH_FOR_QUARTERS:
        for number in range(4):
            left, top = number % 2 * (width // 2), number // 2 * (height // 2)
            yield f"-{number + 1}", image.crop((left, top, left + width // 2, top + height // 2))
    yield "", image


def _iter_files(source: PhotoSource, packages: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each photo of a package."""
    if source.package == "gcompris-qt-data":
        yield from _iter_qt_photos(packages)
        return
    if source.package == "@vendure/create":
        yield from _iter_npm_photos(packages)
        return
    if source.package == "scikit-image":
        spec = find_spec("skimage")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the photos of scikit-image need `pip install scikit-image`; {_FALLBACK_HINT}")
        folder = Path(spec.submodule_search_locations[0]) / "data"
    else:
        folder = unpack_debian_package(packages, source.package, _FALLBACK_HINT)
    for name in source.names:
        # Plasma stores each wallpaper in several sizes, in a folder of its name.
        paths = [
            *folder.rglob(f"{name}.jpg"), *folder.rglob(f"{name}.png"), *folder.rglob(f"{name}/contents/images/*x*.jpg")
        ]  # fmt: skip
        if not paths:
            raise ValueError(f"{source.package} has no photo {name} in this version; {_FALLBACK_HINT}")
        yield name, max(paths, key=lambda path: path.stat().st_size).read_bytes()


def _iter_qt_photos(packages: Path) -> Iterator[tuple[str, bytes]]:
    for resource, path, content in iter_qt_photos(packages, _FALLBACK_HINT):
        if resource != "categorization" or any(group in path for group in _PHOTO_GROUPS):
            yield f"{resource}-{Path(path).stem}", content


def _iter_npm_photos(packages: Path) -> Iterator[tuple[str, bytes]]:
    command = ["npm", "pack", "@vendure/create@3.7.3"]
    with tarfile.open(download_package(packages, "vendure-create-*.tgz", command, _FALLBACK_HINT)) as tar:
        for member in tar:
            if member.name.startswith("package/assets/images/") and member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                yield Path(member.name).stem, file.read()
