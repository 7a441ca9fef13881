"""Collect 24 photos for comparing codecs from the wallpapers of Debian packages.

Each is cropped to 3:2 or 2:3 and shrunk to 768 x 512 pixels, at least by half, which removes its own JPEG artifacts.
They are not the Kodak images, so results on them cannot be compared with published ones.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bsq_ray.media.images import to_srgb
from bsq_ray.samples.package_download import unpack_debian_package

_LONG, _SHORT = 768, 512
_WALLPAPERS = {
    "lxqt-themes": (
        "usr/share/lxqt/wallpapers",
        ("flowers.png", "appleflower.png", "butterfly.png", "cloud.png", "drop.png", "beam.png", "Valendas.png",
         "after-the-rain.jpg", "fog.jpg", "this-is-not-windows.jpg"),
    ),
    "mate-backgrounds": (
        "usr/share/backgrounds/mate/nature",
        ("Dune.jpg", "RainDrops.jpg", "Storm.jpg", "TwoWings.jpg", "LadyBird.jpg", "YellowFlower.jpg"),
    ),
    "lomiri-wallpapers-16.04": (
        "usr/share/backgrounds",
        ("Dragonfly_by_Bolly.jpg", "picosdeeuropa_by_Aitzol_Berasategi.jpg", "life_by_Aitzol_Berasategi.jpg",
         "aitzgorri_by_Aitzol_Berasategi.jpg", "friends_by_Aitzol_Berasategi.jpg", "seeding_by_Clements_Engelhardt.jpg",
         "Wine_by_Jakkub_Mede.jpg"),
    ),
    "libjxl-testdata": ("usr/share/libjxl-testdata/jxl/flower", ("flower.png",)),
}  # fmt: skip
_FALLBACK_HINT = "or use your own photos with --images FOLDER"


def collect_wallpapers(destination: Path, packages: Path) -> Path:
    """Write the photos as PNG to `destination` unless they exist; return the folder.

    Args:
        destination: folder of the photos.
        packages: folder in which fetched packages are kept.

    Raises:
        ValueError: a package cannot be fetched, or lacks a photo.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for package, (folder, names) in _WALLPAPERS.items():
        missing = [name for name in names if not (destination / f"{Path(name).stem}.png").exists()]
        if not missing:
            continue
        unpacked = unpack_debian_package(packages, package, _FALLBACK_HINT)
        for name in missing:
            path = unpacked / folder / name
            if not path.exists():
                raise ValueError(f"{package} has no {folder}/{name} in this version; {_FALLBACK_HINT}")
            with Image.open(path) as file:
                _crop_and_resize(to_srgb(file)).save(destination / f"{path.stem}.png")
    return destination


def _crop_and_resize(image: Image.Image) -> Image.Image:
    width, height = (_LONG, _SHORT) if image.width >= image.height else (_SHORT, _LONG)
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
