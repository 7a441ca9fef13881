"""The photographs that codecs are compared on: cut to 3:2, reduced, and named when they are missing."""

import numpy as np
import pytest
from PIL import Image

from bsq_ray.samples import wallpapers


@pytest.fixture
def fake_packages(photos, tmp_path, monkeypatch):
    """What unpacked packages look like: every photograph that is wanted, small ones of the tests."""

    def unpack(packages, name, instead):
        folder, names = wallpapers._WALLPAPERS[name]
        package_folder = packages / name
        (package_folder / folder).mkdir(parents=True, exist_ok=True)
        for number, file_name in enumerate(names):
            photo = photos[number % len(photos)]
            photo.resize((90, 60) if number % 2 else (60, 90)).save(package_folder / folder / file_name)
        return package_folder

    monkeypatch.setattr(wallpapers, "debian_package", unpack)
    return tmp_path / "packages"


def test_collect_wallpapers_writes_24_images(packages, tmp_path):
    """There are 24 PNG images of 768 x 512 or 512 x 768 pixels."""
    folder = wallpapers.collect_wallpapers(tmp_path / "pictures", packages)
    sizes = [Image.open(path).size for path in folder.iterdir()]
    assert len(sizes) == 24
    assert set(sizes) == {(768, 512), (512, 768)}
    assert {path.suffix for path in folder.iterdir()} == {".png"}


def test_collect_wallpapers_keeps_existing_files(packages, tmp_path, monkeypatch):
    """Existing images are not collected again."""
    folder = wallpapers.collect_wallpapers(tmp_path / "pictures", packages)
    monkeypatch.setattr(wallpapers, "debian_package", lambda *arguments: pytest.fail("fetched again"))
    assert wallpapers.collect_wallpapers(tmp_path / "pictures", packages) == folder


def test_collect_wallpapers_missing_file_raises(packages, tmp_path, monkeypatch):
    """A file missing from a package raises an error that names it."""

    def unpack_nothing(packages, name, instead):
        (packages / name).mkdir(parents=True)
        return packages / name

    monkeypatch.setattr(wallpapers, "debian_package", unpack_nothing)
    with pytest.raises(ValueError, match="lxqt-themes has no usr/share/lxqt/wallpapers/flowers.png.*--images"):
        wallpapers.collect_wallpapers(tmp_path / "pictures", packages)


def test_crop_and_resize_keeps_the_center():
    """Stripes of one brightness each: what is left of them says which part of the image was kept."""
    columns = np.linspace(0, 250, 2000).astype(np.uint8)
    wide = Image.fromarray(np.broadcast_to(columns[None, :, None], (800, 2000, 3)).copy())
    pixels_HW3 = np.asarray(wallpapers._crop_and_resize(wide))
    assert pixels_HW3.shape == (512, 768, 3)
    # 1200 of 2000 columns are 3:2 of 800 rows.
    assert pixels_HW3[0, 0, 0] == pytest.approx(columns[400], abs=2)
    assert pixels_HW3[0, -1, 0] == pytest.approx(columns[1599], abs=2)
