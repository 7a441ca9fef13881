"""The photos for comparing codecs: cropped to 3:2, shrunk, and errors for missing files."""

import numpy as np
import pytest
from PIL import Image

from bsq_ray.samples import wallpapers


@pytest.fixture
def fake_packages(photos, tmp_path, monkeypatch):
    """A folder like that of unpacked packages, with small test photos."""

    def unpack(packages, name, fallback_hint):
        folder, names = wallpapers._WALLPAPERS[name]
        package_folder = packages / name
        (package_folder / folder).mkdir(parents=True, exist_ok=True)
        for number, file_name in enumerate(names):
            photo = photos[number % len(photos)]
            photo.resize((90, 60) if number % 2 else (60, 90)).save(package_folder / folder / file_name)
        return package_folder

    monkeypatch.setattr(wallpapers, "unpack_debian_package", unpack)
    return tmp_path / "packages"


def test_collect_wallpapers_writes_24_images(fake_packages, tmp_path):
    """There are 24 PNG images of 768 x 512 or 512 x 768 pixels."""
    folder = wallpapers.collect_wallpapers(tmp_path / "photos", fake_packages)
    sizes = [Image.open(path).size for path in folder.iterdir()]
    assert len(sizes) == 24
    assert set(sizes) == {(768, 512), (512, 768)}
    assert {path.suffix for path in folder.iterdir()} == {".png"}


def test_collect_wallpapers_keeps_existing_files(fake_packages, tmp_path, monkeypatch):
    """Existing images are not collected again."""
    folder = wallpapers.collect_wallpapers(tmp_path / "photos", fake_packages)
    monkeypatch.setattr(wallpapers, "unpack_debian_package", lambda *arguments: pytest.fail("fetched again"))
    assert wallpapers.collect_wallpapers(tmp_path / "photos", fake_packages) == folder


def test_collect_wallpapers_missing_file_raises(fake_packages, tmp_path, monkeypatch):
    """A file missing from a package raises an error that names it."""

    def unpack_nothing(packages, name, fallback_hint):
        (packages / name).mkdir(parents=True)
        return packages / name

    monkeypatch.setattr(wallpapers, "unpack_debian_package", unpack_nothing)
    with pytest.raises(ValueError, match="lxqt-themes has no usr/share/lxqt/wallpapers/flowers.png.*--images"):
        wallpapers.collect_wallpapers(tmp_path / "photos", fake_packages)


def test_crop_and_resize_keeps_the_center():
    """The crop is centered: the brightness of its outer columns gives their original position."""
    columns = np.linspace(0, 250, 2000).astype(np.uint8)
    wide = Image.fromarray(np.broadcast_to(columns[None, :, None], (800, 2000, 3)).copy())
    pixels_HW3 = np.asarray(wallpapers._crop_and_resize(wide))
    assert pixels_HW3.shape == (512, 768, 3)
    # 1200 of 2000 columns are 3:2 of 800 rows.
    assert pixels_HW3[0, 0, 0] == pytest.approx(columns[400], abs=2)
    assert pixels_HW3[0, -1, 0] == pytest.approx(columns[1599], abs=2)
