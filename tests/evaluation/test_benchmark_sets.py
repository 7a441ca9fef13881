"""The layouts in which Kodak, MCL-JCV and UVG are handed out, and folders of one's own."""

import pytest

from bsq_ray.evaluation.compression.datasets import find_set

UVG = ["Beauty", "Bosphorus", "HoneyBee", "Jockey", "ReadySteadyGo", "ShakeNDry", "YachtRide"]


def made(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    ("names", "said", "kind", "items"),
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
def test_sets_are_known_by_their_names(tmp_path, names, said, kind, items):
    url = made(tmp_path, names)
    found = find_set(url)
    assert (found.name, found.kind, len(found.items)) == (said or url, kind, items)
    assert all(item.startswith(url) for item in found.items.values())


def test_a_clip_of_frames_is_its_folder(tmp_path):
    url = made(tmp_path, ["sets/Jockey/im1.png", "sets/Jockey/im2.png"])
    assert find_set(url).items == {"sets/Jockey": f"{url}/sets/Jockey"}


def test_sets_are_found_behind_urls(bucket):
    from bsq_ray import storage

    for n in (1, 2):
        storage.write_bytes(f"{bucket}/kodak/kodim{n:02}.png", b"")
    assert find_set(f"{bucket}/kodak").items["kodim02.png"] == f"{bucket}/kodak/kodim02.png"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "b.mp4"], "holds images (a.png, …) and clips (b.mp4, …)"),
        (["notes.txt"], "holds no images and no clips"),
    ],
)
def test_other_folders_are_refused(tmp_path, names, message):
    with pytest.raises(ValueError) as error:
        find_set(made(tmp_path, names))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="does not exist"):
        find_set(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is not a folder"):
        find_set(str(tmp_path / names[0]))
