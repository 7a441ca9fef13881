"""The photographs that codecs are compared on: cut to 3:2, reduced, and named when they are missing."""

import numpy as np
import pytest
from PIL import Image

from bsq_ray.samples import wallpapers


@pytest.fixture
def packages(photos, tmp_path, monkeypatch):
    """What unpacked packages look like: every photograph that is wanted, small ones of the tests."""

    def unpacked(packages, name, instead):
        folder, names = wallpapers._PICTURES[name]
        place = packages / name
        (place / folder).mkdir(parents=True, exist_ok=True)
        for number, wanted in enumerate(names):
            photo = photos[number % len(photos)]
            photo.resize((90, 60) if number % 2 else (60, 90)).save(place / folder / wanted)
        return place

    monkeypatch.setattr(wallpapers, "debian_package", unpacked)
    return tmp_path / "packages"


def test_there_are_24_of_768_by_512(packages, tmp_path):
    folder = wallpapers.collect_pictures(tmp_path / "pictures", packages)
    sizes = [Image.open(path).size for path in folder.iterdir()]
    assert len(sizes) == 24
    assert set(sizes) == {(768, 512), (512, 768)}
    assert {path.suffix for path in folder.iterdir()} == {".png"}


def test_what_is_there_is_not_collected_again(packages, tmp_path, monkeypatch):
    folder = wallpapers.collect_pictures(tmp_path / "pictures", packages)
    monkeypatch.setattr(wallpapers, "debian_package", lambda *arguments: pytest.fail("fetched again"))
    assert wallpapers.collect_pictures(tmp_path / "pictures", packages) == folder


def test_a_missing_photograph_is_named(packages, tmp_path, monkeypatch):
    def emptied(packages, name, instead):
        (packages / name).mkdir(parents=True)
        return packages / name

    monkeypatch.setattr(wallpapers, "debian_package", emptied)
    with pytest.raises(ValueError, match="lxqt-themes has no usr/share/lxqt/wallpapers/flowers.png.*--images"):
        wallpapers.collect_pictures(tmp_path / "pictures", packages)


def test_the_middle_is_kept_and_reduced():
    """Stripes of one brightness each: what is left of them says which part of the image was kept."""
    columns = np.linspace(0, 250, 2000).astype(np.uint8)
    wide = Image.fromarray(np.broadcast_to(columns[None, :, None], (800, 2000, 3)).copy())
    kept = np.asarray(wallpapers._reduced(wide))
    assert kept.shape == (512, 768, 3)
    # 1200 of 2000 columns are 3:2 of 800 rows.
    assert kept[0, 0, 0] == pytest.approx(columns[400], abs=2)
    assert kept[0, -1, 0] == pytest.approx(columns[1599], abs=2)
