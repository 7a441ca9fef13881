"""Reading frames of video files: the right ones, from every container, without decoding the others."""

import gc
import io
import os
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from small_videos import make_street_video, make_video

from bsq_ray.media import video_reader
from bsq_ray.media.decode_error import DecodeError
from bsq_ray.media.frame_display import display_rgb
from bsq_ray.media.video_reader import decode_frames, open_video, probe, read_frames, read_video

_CONTAINERS = Path(find_spec("iscc_samples").submodule_search_locations[0]) / "files" / "video"


def all_frames(data):
    with open_video(io.BytesIO(data)) as (container, stream):
        return [display_rgb(frame, stream) for frame in decode_frames(container, stream)]


@pytest.mark.parametrize("suffix", ["3gp", "avi", "flv", "mkv", "mp4", "mpg", "webm", "wmv"])
def test_read_frames_from_middle_equals_full_decode(suffix):
    """Frames read from the middle of a file equal those of a full decode."""
    data = (_CONTAINERS / f"demo.{suffix}").read_bytes()
    video, frames = probe(io.BytesIO(data)).video, all_frames(data)
    assert video.frames == len(frames) == 1441
    assert video.fps == pytest.approx(24, rel=0.002)
    assert (video.width, video.height) == frames[0].shape[1::-1]
    for start in (0, 1, 333, 800, 1426):
        read = [np.asarray(image) for image in read_frames(io.BytesIO(data), video, start, 5, 3)]
        assert all((image == frames[start + 3 * n]).all() for n, image in enumerate(read)), start
        assert len(read) == 5


@pytest.mark.parametrize(("name", "reason"), [("gone.mp4", "No such file"), ("", "Is a directory")])
def test_read_video_unreadable_path_gives_the_reason(tmp_path, name, reason):
    """The reason of the operating system is reported, not the content that could not be read."""
    with pytest.raises(DecodeError, match=rf"not a video of a known format \({reason}"):
        read_video(str(tmp_path / name))


def test_read_video_pipe_without_video_gives_the_reason():
    """A file that cannot be read again is not described by its content."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as file, os.fdopen(writer, "wb") as content:
        content.write(bytes(range(1, 256)) * 8)
        content.close()
        with pytest.raises(DecodeError, match=r"not a video of a known format \(Invalid data"):
            read_video(file)


def test_read_video_frees_each_frame_at_once():
    """They hold memory and threads; in a cycle of references they would wait for a garbage collection."""
    frames = read_video(io.BytesIO(make_street_video(40)), "mov").frames
    gc.collect()
    gc.disable()
    try:
        for count, _ in enumerate(frames, 1):
            if count in (10, 40):
                assert sum(type(value) is av.VideoFrame for value in gc.get_objects()) < 8
    finally:
        gc.enable()
    assert count == 40


def test_read_frames_decodes_from_nearest_key_frame(video_folders, monkeypatch):
    """Decoding starts at the last key frame before the requested frame."""
    data = (video_folders[0] / "bikes.mp4").read_bytes()
    video = probe(io.BytesIO(data)).video
    start = video.key_frames[3] + 2
    numbers = []
    decode_from_key_frame = video_reader._decode_from_key_frame

    def record_numbers(*arguments):
        for number, frame, stream in decode_from_key_frame(*arguments):
            numbers.append(number)
            yield number, frame, stream

    monkeypatch.setattr(video_reader, "_decode_from_key_frame", record_numbers)
    list(read_frames(io.BytesIO(data), video, start, 4, 2))
    assert numbers == list(range(video.key_frames[3], start + 7))


def test_read_frames_rotated_video_is_upright(video_folders):
    """A video with rotation metadata is read upright."""
    data = (video_folders[1] / "carphone_pristine.mp4").read_bytes()
    straight = all_frames(data)[0]
    unit, rotation = ([65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30], [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])
    matrix = [b"".join(number.to_bytes(4, "big", signed=True) for number in numbers) for numbers in (unit, rotation)]
    track = data.index(b"tkhd")
    data = data[:track] + data[track:].replace(*matrix, 1)
    video = probe(io.BytesIO(data)).video
    assert (video.width, video.height) == (144, 193)
    [image] = read_frames(io.BytesIO(data), video, 0, 1, 1)
    assert (np.asarray(image) == np.rot90(straight, -1)).all()


def test_read_frames_replaced_file_raises(video_folders):
    """A file that does not match the manifest raises an error."""
    video = probe(io.BytesIO((video_folders[0] / "bikes.mp4").read_bytes())).video
    other = (video_folders[1] / "carphone_pristine.mp4").read_bytes()
    with pytest.raises(ValueError, match="ends before frame 200 of 250"):
        list(read_frames(io.BytesIO(other), video, 200, 4, 1))


@pytest.mark.parametrize(
    ("name", "share", "reason"),
    [
        ("demo.avi", 0.4, "corrupt|ends after"),
        ("demo.mp4", 0.4, "Invalid data"),
        ("demo.mpg", 0.1, "corrupt"),
        ("demo.txt", 1.0, "Invalid data"),
        ("demo.mp3", 1.0, "no video stream"),
    ],
)
def test_probe_damaged_file_raises_with_reason(name, share, reason):
    """A damaged file raises an error that contains the reason."""
    path = next(_CONTAINERS.parent.rglob(name))
    data = path.read_bytes()
    with pytest.raises(ValueError, match=reason):
        probe(io.BytesIO(data[: int(len(data) * share)]))


def test_probe_dropped_frames_are_not_variable_rate(photos):
    """Dropped frames do not count as a variable frame rate; uneven time stamps do."""
    steady = make_video(photos[0], [n * 40 for n in range(100) if n not in (20, 60)])
    uneven = make_video(photos[0], [40 * n if n < 50 else 40 * 50 + 100 * (n - 50) for n in range(100)])
    assert not probe(io.BytesIO(steady)).is_variable_rate
    assert probe(io.BytesIO(steady)).video.fps == pytest.approx(25)
    assert probe(io.BytesIO(uneven)).is_variable_rate
