"""Published layouts of Kodak, MCL-JCV and UVG, and unnamed folders."""

import pytest

from bsq_ray.evaluation.compression.datasets import find_dataset

UVG = ["Beauty", "Bosphorus", "HoneyBee", "Jockey", "ReadySteadyGo", "ShakeNDry", "YachtRide"]


def make_files(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "expected_name", "kind", "items"),
    [
        ([f"kodim{n:02}.png" for n in range(1, 25)], "Kodak", "images", 24),
        ([f"kodak/kodim{n:02}.webp" for n in range(1, 25)] + ["kodak/README.txt"], "Kodak", "images", 24),
        ([f"kodim{n:02}.png" for n in (3, 5)], "Kodak (2 of 24)", "images", 2),
        ([f"videoSRC{n:02}_1920x1080_30.yuv" for n in range(1, 31)], "MCL-JCV", "clips", 30),
        ([f"videoSRC{n:02}/videoSRC{n:02}.mp4" for n in range(1, 31)], "MCL-JCV", "clips", 30),
        ([f"videoSRC07_1920x1080_25/im{n:05}.png" for n in range(1, 9)], "MCL-JCV (1 of 30)", "clips", 1),
        ([f"{name}_1920x1080_120fps_420_8bit_YUV.yuv" for name in UVG], "UVG", "clips", 7),
        ([f"{n}_1920x1080_120fps_420_8bit_YUV_RAW/{n}_1920x1080_120fps_420_8bit_YUV.y4m" for n in UVG], "UVG",
         "clips", 7),
        ([f"{name}/f{n:03}.png" for name in UVG[:2] for n in range(3)], "UVG (2 of 7)", "clips", 2),
        (["a.jpg", "deeper/b.png"], None, "images", 2),
        (["kodim01.png", "mine.png"], None, "images", 2),
        (["trip.mp4", "Beauty.mkv"], None, "clips", 2),
        (["Beautyful.mp4"], None, "clips", 1),
    ],
)  # fmt: skip
def test_find_dataset_published_layouts_are_recognized(tmp_path, names, expected_name, kind, items):
    """Kodak, MCL-JCV and UVG are recognized by their file names; any other folder is named by its URL."""
    url = make_files(tmp_path, names)
    dataset = find_dataset(url)
    assert (dataset.name, dataset.kind, len(dataset.items)) == (expected_name or url, kind, items)
    assert all(item.startswith(url) for item in dataset.items.values())


def test_find_dataset_frame_folder_counts_as_one_clip(tmp_path):
    url = make_files(tmp_path, ["sets/Jockey/im1.png", "sets/Jockey/im2.png"])
    assert find_dataset(url).items == {"sets/Jockey": f"{url}/sets/Jockey"}


def test_find_dataset_reads_object_storage_urls(bucket):
    from bsq_ray import storage

    for n in (1, 2):
        storage.write_bytes(f"{bucket}/kodak/kodim{n:02}.png", b"")
    assert find_dataset(f"{bucket}/kodak").items["kodim02.png"] == f"{bucket}/kodak/kodim02.png"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "b.mp4"], "contains images (a.png, …) and clips (b.mp4, …)"),
        (["notes.txt"], "contains no images and no clips"),
    ],
)
def test_find_dataset_invalid_folder_raises(tmp_path, names, message):
    with pytest.raises(ValueError) as error:
        find_dataset(make_files(tmp_path, names))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="does not exist"):
        find_dataset(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is not a folder"):
        find_dataset(str(tmp_path / names[0]))


def test_find_dataset_follows_links_and_names_what_it_ignores(tmp_path):
    """Linked folders are followed; leftovers and broken links are ignored and named."""
    make_files(tmp_path, ["store/a.jpg", "set/b.png", "set/._b.png", "set/.thumbnails/b.png", "set/notes.txt"])
    (tmp_path / "set" / "linked").symlink_to("../store")
    (tmp_path / "set" / "gone.png").symlink_to("nowhere.png")
    dataset = find_dataset(str(tmp_path / "set"))
    assert list(dataset.items) == ["b.png", "linked/a.jpg"]
    text = "\n".join(dataset.ignored)
    assert "1 files of other types: .txt (1)" in text
    assert "2 leftovers of systems and tools" in text
    assert "1 broken links: gone.png" in text
