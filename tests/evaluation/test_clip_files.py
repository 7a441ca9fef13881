"""Clips to compress: what is read from raw YUV, from video files and from frames is what was filmed."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from bsq_ray.evaluation.compression.clip_files import read_video_clip


@pytest.fixture(scope="module")
def carphone(video_folders):
    return str(video_folders[1] / "carphone_pristine.mp4")


@pytest.fixture(scope="module")
def clip(carphone):
    return read_video_clip(carphone, max_frames=5)


@pytest.fixture(scope="module")
def raw(carphone, tmp_path_factory):
    """The same frames as a raw file: the planes as they are decoded."""
    path = tmp_path_factory.mktemp("raw") / "carphone_176x144_30.yuv"
    with av.open(carphone) as file:
        planes = [frame.to_ndarray(format="yuv420p") for frame, _ in zip(file.decode(video=0), range(5), strict=False)]
    path.write_bytes(np.stack(planes).tobytes())
    return path


def test_read_video_clip_of_video_file(clip):
    """A video file is read with its frames and frame rate."""
    assert clip.frames_THW3.shape == (5, 144, 176, 3)
    assert clip.frames_THW3.dtype == np.uint8
    assert clip.frame_rate == pytest.approx(30, abs=0.1)


def test_read_video_clip_raw_equals_video_file(clip, raw):
    """Raw YUV frames equal the frames of the video file they come from."""
    raw_clip = read_video_clip(str(raw))
    assert raw_clip.frames_THW3.shape == clip.frames_THW3.shape
    assert raw_clip.frame_rate == 30
    assert np.abs(raw_clip.frames_THW3.astype(int) - clip.frames_THW3).mean() < 1
    assert len(read_video_clip(str(raw), max_frames=2).frames_THW3) == 2


def test_read_video_clip_raw_hd_uses_bt709(tmp_path):
    """The same planes, strongly red, under both matrices."""
    planes = {name: np.full((height * 3 // 2, 16), 128, np.uint8) for name, height in (("sd", 718), ("hd", 720))}
    for name, each in planes.items():
        each[each.shape[0] * 5 // 6 :] = 170
        (tmp_path / f"{name}_16x{each.shape[0] * 2 // 3}_25.yuv").write_bytes(each.tobytes())
    sd, hd = (
        read_video_clip(str(path)).frames_THW3[0, 300, 8].astype(int) for path in sorted(tmp_path.iterdir())[::-1]
    )
    assert 6 < hd[0] - sd[0] < 11, "BT.709 weighs red by 1.79 instead of 1.60"


def test_read_video_clip_of_frame_folder(clip, tmp_path):
    """A folder of frames is read in order, and invalid folders raise an error."""
    for number, pixels in enumerate(clip.frames_THW3):
        Image.fromarray(pixels[:143]).save(tmp_path / f"im{number:03}.png")
    folder_clip = read_video_clip(str(tmp_path))
    assert folder_clip.frame_rate == Fraction(30)
    assert np.array_equal(folder_clip.frames_THW3, clip.frames_THW3[:, :142]), "an odd row is cut"
    Image.new("RGB", (64, 64)).save(tmp_path / "im999.png")
    with pytest.raises(ValueError, match="frames of different sizes"):
        read_video_clip(str(tmp_path))
    (tmp_path / "im999.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="im999.png cannot be read as an image"):
        read_video_clip(str(tmp_path))


@pytest.mark.parametrize("pattern", ["{}.png", "frame{}.jpg", "im{}-small.png", "{:04}.webp", "shot 1 ({}).png"])
def test_read_video_clip_frames_are_in_the_order_of_numbers(tmp_path, pattern):
    """Numbers in the names of frames are compared as numbers, and files that are no frames are ignored."""
    for number in range(1, 13):
        Image.new("L", (16, 16), 20 * number).save(tmp_path / pattern.format(number))
    for name in ("Thumbs.db", ".DS_Store", "._1.png", "frames.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".thumbnails").mkdir()
    frames_THW3 = read_video_clip(str(tmp_path)).frames_THW3
    assert np.round(frames_THW3.mean((1, 2, 3)) / 20).tolist() == list(range(1, 13))


def test_read_video_clip_frame_without_a_file_raises(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"2\.png is a link to a file that does not exist"):
        read_video_clip(str(tmp_path))


def test_read_video_clip_max_side_gives_even_sides(carphone):
    """Frames above `max_side` are shrunk to even sides."""
    assert read_video_clip(carphone, 2, max_side=100).frames_THW3.shape == (2, 82, 100, 3)
    assert read_video_clip(carphone, 2, max_side=500).frames_THW3.shape == (2, 144, 176, 3)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("clip.yuv", 96, "the name has no frame size"),
        ("clip_8x8_30.yuv", 97, "97 bytes are not a multiple of 96, a frame of 8 x 8 pixels"),
        ("clip_8x8_30.yuv", 0, "0 bytes are not a multiple"),
        ("clip_7x8_30.yuv", 84, "4:2:0 requires even sides"),
        ("clip_0x8_30.yuv", 84, "4:2:0 requires even sides"),
        ("clip_8x8_120fps_420_10bit_YUV.yuv", 96, "10 bits per sample"),
        ("clip.mp4", 96, "not a video of a known format"),
    ],
)
def test_read_video_clip_invalid_file_raises(tmp_path, name, size, message):
    """A file that cannot be read raises an error that names it once."""
    (tmp_path / name).write_bytes(bytes(size))
    with pytest.raises(ValueError, match=message) as error:
        read_video_clip(str(tmp_path / name))
    assert str(error.value).count(str(tmp_path)) == 1
    with pytest.raises(ValueError, match="does not exist"):
        read_video_clip(str(tmp_path / "none.mp4"))


def test_read_video_clip_keeps_planes_of_420_sources(clip, raw, tmp_path):
    """Video files and raw files that are stored as 4:2:0 keep their planes; shrunk and RGB clips have none."""
    raw_clip = read_video_clip(str(raw))
    assert np.array_equal(raw_clip.stored.planes_TPW, clip.stored.planes_TPW)
    assert raw_clip.stored.planes_TPW.tobytes() == raw.read_bytes()
    assert np.array_equal(raw_clip.frames_THW3, clip.frames_THW3)
    assert read_video_clip(str(raw), max_side=100).stored is None
    Image.fromarray(clip.frames_THW3[0]).save(tmp_path / "1.png")
    assert read_video_clip(str(tmp_path)).stored is None
