"""Published layouts of Kodak, CLIC 2020, DIV2K, MCL-JCV and UVG, and unnamed folders."""

import pytest
from PIL import Image

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
        ([f"CLIC2020Professional_test/professional/{n:x}.png" for n in range(250)], "CLIC 2020 professional test",
         "images", 250),
        ([f"clic/CLIC2020Mobile_test/mobile/{n:x}.png" for n in range(178)], "CLIC 2020 mobile test", "images", 178),
        ([f"CLIC2020Professional_test/{n:x}.png" for n in range(250)]
         + [f"CLIC2020Mobile_test/{n:x}.png" for n in range(178)], "CLIC 2020 test", "images", 428),
        ([f"professional_valid_2020/valid/{n}.png" for n in range(41)], "CLIC 2020 professional validation", "images",
         41),
        ([f"professional_valid_2020/valid/{n}.png" for n in range(41)]
         + [f"mobile_valid_2020/valid/{n}.png" for n in range(60)], "CLIC 2020 validation (101 of 102)", "images", 101),
        ([f"CLIC2020Professional_test/{n}.png" for n in range(250)]
         + [f"mobile_valid_2020/valid/{n}.png" for n in range(61)], None, "images", 311),
        ([f"DIV2K_valid_HR/{n:04}.png" for n in range(801, 901)], "DIV2K validation", "images", 100),
        ([f"DIV2K_valid_HR/{n:04}.png" for n in range(801, 804)], "DIV2K validation (3 of 100)", "images", 3),
        ([f"DIV2K_train_HR/{n:04}.png" for n in range(1, 9)], None, "images", 8),
        ([f"DIV2K_valid_HR/{n:04}x4.png" for n in range(801, 809)], None, "images", 8),
        ([f"numbers/{n:04}.png" for n in range(801, 901)], None, "images", 100),
        (["a.jpg", "deeper/b.png"], None, "images", 2),
        (["kodim01.png", "mine.png"], None, "images", 2),
        (["trip.mp4", "Beauty.mkv"], None, "clips", 2),
        (["Beautyful.mp4"], None, "clips", 1),
    ],
)  # fmt: skip
def test_find_dataset_published_layouts_are_recognized(tmp_path, names, expected_name, kind, items):
    """Published sets are recognized by the names of files and folders; any other folder is named by its URL."""
    url = make_files(tmp_path, names)
    dataset = find_dataset(url)
    assert (dataset.name, dataset.kind, len(dataset.items)) == (expected_name or url, kind, items)
    assert all(item.startswith(url) for item in dataset.items.values())


def test_find_dataset_reads_folder_name_from_url(tmp_path):
    """The folder that names a data set may be the one that is passed."""
    make_files(tmp_path, ["CLIC2020Mobile_test/mobile/a.png", "DIV2K_valid_HR/0801.png"])
    assert find_dataset(str(tmp_path / "CLIC2020Mobile_test" / "mobile")).name == "CLIC 2020 mobile test (1 of 178)"
    assert find_dataset(str(tmp_path / "DIV2K_valid_HR")).name == "DIV2K validation (1 of 100)"


@pytest.mark.parametrize(("name", "side"), [("DIV2K_valid_HR/0801.png", 2040), ("kodim01.png", 768)])
def test_find_dataset_images_of_other_sizes_are_named(tmp_path, name, side):
    """Shrunk copies of a published set keep its name, with a warning; portrait images have the same longer side."""
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    for size, has_warning in (((side, 16), False), ((16, side), False), ((side // 2, 16), True)):
        Image.new("RGB", size).save(path)
        warnings = find_dataset(str(tmp_path / "set")).warnings
        assert len(warnings) == has_warning
    assert f"1 of 1 images do not have the {side} pixels" in warnings[0]
    assert f"such as {name} with {side // 2} x 16" in warnings[0]


@pytest.mark.parametrize(
    ("folder", "instructions"),
    [
        ("kodak", ["Kodak is not included: get its 24 images from https://r0k.us/graphics/kodak and keep their file"]),
        ("DIV2K", ["get its 100 images from https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip and keep the"]),
        ("CLIC2020Mobile_test", ["CLIC 2020 mobile test is not included: get its 178 images from"]),
        ("clic2020", ["250 images", "178 images", "41 images", "61 images"]),
        ("holiday", []),
    ],
)
def test_find_dataset_missing_published_set_gives_its_source(tmp_path, folder, instructions):
    """The message of a missing or empty folder named after a published set names its source."""
    for message in ("does not exist", "contains no images and no clips"):
        with pytest.raises(ValueError) as error:
            find_dataset(str(tmp_path / folder))
        assert message in str(error.value)
        assert all(each in str(error.value) for each in instructions)
        assert str(error.value).count("is not included") == len(instructions)
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "notes.txt").write_text("")


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
