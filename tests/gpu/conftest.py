"""Fixtures of the GPU tests: the device, and photos of packages that are usually installed on GPU nodes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from bsq_ray.runtime.precision import enable_strict_fp32

# The other tests' photos come from more packages; scikit-image and scikit-learn bring these.
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_TRAINING = {"astronaut.png", "color.png", "motorcycle_left.png", "rocket.jpg", "flower.jpg", "grass.png", "gravel.png"}
_HELD_OUT = {"chelsea.png", "coffee.png", "china.jpg"}


@pytest.fixture(scope="session")
def gpu():
    """Return the device of these tests."""
    return torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _strict_fp32():
    """Multiply in full fp32 precision, as the CPU does."""
    enable_strict_fp32()


@pytest.fixture(scope="session")
def photo_folders(tmp_path_factory):
    """(train, held_out): quarters of photos, so that there are enough of them."""
    folders = tmp_path_factory.mktemp("train"), tmp_path_factory.mktemp("held_out")
    for package, inside in _FOLDERS.items():
        for path in sorted((Path(find_spec(package).submodule_search_locations[0]) / inside).iterdir()):
            if path.name not in _TRAINING | _HELD_OUT:
                continue
            image = Image.open(path).convert("RGB")
            width, height = image.width // 2, image.height // 2
            for part in range(4):
                left, top = part % 2 * width, part // 2 * height
                quarter = image.crop((left, top, left + width, top + height))
                quarter.save(folders[path.name in _HELD_OUT] / f"{path.stem}-{part}.png")
    return folders
