"""Photos for the shipped models, from stand-ins for the packages."""

import io

import pytest
from PIL import Image

from bsq_ray.samples import training_photos
from bsq_ray.samples.training_photos import MAX_SIDE, SOURCES, PhotoSource, collect_training_photos


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def collect(photos, tmp_path, monkeypatch):
    """Collects photos from a package with these files; the held-out photo and the wallpaper are photos 0 and 1."""
    held_out, wallpapers = tmp_path / "packages/labeled/held_out", tmp_path / "wallpapers"
    for folder, photo in ((held_out, photos[0]), (wallpapers, photos[1])):
        folder.mkdir(parents=True)
        photo.save(folder / "photo.png")
    monkeypatch.setattr(training_photos, "collect_labeled_photos", lambda *_: (None, held_out))
    monkeypatch.setattr(training_photos, "collect_wallpapers", lambda *_: wallpapers)
    monkeypatch.setattr(training_photos, "collect_photos", lambda *_: (None, held_out))
    monkeypatch.setattr(training_photos, "SOURCES", (PhotoSource("@a/photos", "CC0"),))

    def run(files):
        monkeypatch.setattr(training_photos, "_iter_files", lambda *_: iter(files.items()))
        folder, held_out_folder = collect_training_photos(tmp_path / "photos", tmp_path / "packages")
        assert held_out_folder == held_out
        return sorted((folder / "a-photos").iterdir())

    return run


def test_evaluated_photos_copies_and_small_photos_are_skipped(collect, photos):
    """Training never sees a photo that an evaluation uses, in any size."""
    files = {
        "held-out": png(photos[0].resize((400, 300))),
        "wallpaper": png(photos[1].resize((300, 200))),
        "small": png(photos[2].resize((127, 300))),
        "photo": png(photos[3]),
        "copy": png(photos[3]),
    }
    paths = collect(files)
    assert [path.name.rpartition("-")[0] for path in paths] == ["photo"]
    with Image.open(paths[0]) as image:
        assert max(image.size) <= MAX_SIDE


def test_large_photos_give_their_quarters_too(collect, photos):
    """A photo of more pixels than are kept contains details that its parts show."""
    large = photos[4].resize((2 * MAX_SIDE, MAX_SIDE))
    paths = collect({"large": png(large)})
    assert [path.stem.rpartition("-")[2] for path in paths][:4] == ["1", "2", "3", "4"]
    assert len(paths) == 5
    with Image.open(paths[3]) as image:
        assert image.size == (MAX_SIDE, MAX_SIDE // 2)
        quarter = large.crop((MAX_SIDE, MAX_SIDE // 2, 2 * MAX_SIDE, MAX_SIDE)).resize((8, 4))
        pairs = zip(image.resize((8, 4)).getdata(), quarter.getdata(), strict=True)
        assert max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True)) < 12


def test_complete_folder_is_not_collected_again(collect, photos):
    first = collect({"photo": png(photos[3])})
    assert collect({"other": png(photos[4])}) == first


def test_every_source_states_its_license():
    assert all(source.license for source in SOURCES)
    assert len({source.package for source in SOURCES}) == len(SOURCES)
