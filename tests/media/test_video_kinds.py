"""Videos as phones, cameras and editors write them: rates, trimmed files, orientations, pixel shapes, colors."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from small_videos import (
    copy_packets,
    make_avi_with_gaps,
    make_flat_video,
    make_street_video,
    make_video,
    with_display_matrix,
    with_edit_list,
)

from bsq_ray.data.transcode import transcode_if_needed
from bsq_ray.media.decode_error import DecodeError
from bsq_ray.media.orientation import orientation_of_matrix, to_upright
from bsq_ray.media.video_reader import probe, read_frames, read_video


def read_all(data):
    return list(read_video(io.BytesIO(data)).frames)


def read_clip(data, start, num_frames):
    video = probe(io.BytesIO(data)).video
    return [np.asarray(image) for image in read_frames(io.BytesIO(data), video, start, num_frames, 1)]


def steady(interval_ms, count=20):
    return [interval_ms * number for number in range(count)]


# --- rates

# Times of frames in milliseconds, and the duration in seconds that a player shows them.
RATES = {
    "25 a second": (steady(40), 0.8),
    "slower than the declared rate": (steady(120), 2.4),
    "faster than the declared rate": (steady(10), 0.2),
    "one in five seconds": (steady(5000, 5), 25),
    "NTSC, rounded": ([round(1001 / 30 * number) for number in range(60)], 2.002),
    "half of it slow": ([40 * n if n < 20 else 800 + 100 * (n - 20) for n in range(40)], 2.8),
    "a frame of two seconds": ([*steady(40, 10), *(2360 + 40 * n for n in range(10))], 2.86),
    "telecine": ([number // 4 * 160 + (0, 50, 100, 140)[number % 4] for number in range(40)], 1.6),
    "starts late": ([3000 + 40 * number for number in range(20)], 0.8),
    "references that are not shown": (sorted([*steady(40), *(number * 200 + 1 for number in range(4))]), 0.8),
}


@pytest.mark.parametrize("container_format", ["matroska", "mp4"])
@pytest.mark.parametrize(("times_ms", "duration_s"), RATES.values(), ids=RATES)
def test_read_video_rate_keeps_duration(photos, times_ms, duration_s, container_format):
    """Frames at the rate of the reader last as long as in the file."""
    video = read_video(io.BytesIO(make_video(photos[0], times_ms, container_format)))
    assert video.num_frames / video.frame_rate == pytest.approx(duration_s, rel=0.03)


def test_read_video_constant_rate_is_exact():
    """Time stamps in milliseconds do not change the declared rate."""
    rates = [Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60), Fraction(15, 2)]
    files = [make_street_video(12, container_format="matroska", frame_rate=rate) for rate in rates]
    assert [read_video(io.BytesIO(file)).frame_rate for file in files] == rates


def test_read_video_broken_time_stamps_keep_declared_rate(photos):
    """A jump by hours is no frame of hours."""
    video = read_video(io.BytesIO(make_video(photos[0], [*steady(40, 10), 40_000_000])))
    assert video.frame_rate > 1


# --- trimmed files

# First visible frame and number of visible frames of 60.
TRIMS = {
    "end": (0, 20),
    "start": (20, 40),
    "both": (13, 30),
    "one frame": (59, 1),
    "nothing": (0, 60),
    "most": (48, 12),
}


@pytest.mark.parametrize(("first", "count"), TRIMS.values(), ids=TRIMS)
def test_readers_trimmed_mp4_has_its_visible_frames(first, count):
    """Frames that an edit list hides are not part of the video, and their absence is no damage."""
    whole = make_street_video(60)
    expected = read_all(whole)[first : first + count]
    data = with_edit_list(whole, first, count)
    video = read_video(io.BytesIO(data))
    assert video.num_frames == count
    assert np.array_equal(list(video.frames), expected)
    assert transcode_if_needed(data, "mp4", None, 1).data == data
    middle = count // 2
    assert np.array_equal(read_clip(data, middle, count - middle), expected[middle:])


def test_probe_truncated_mp4_raises():
    """A file whose index names more frames than follow is damaged, whether trimmed or not."""
    whole = make_street_video(60)
    for data in (whole, with_edit_list(whole, 10, 50)):
        content = data.index(b"mdat") - 4
        size = int.from_bytes(data[content : content + 4], "big")
        # The index is moved to the front, as for streaming, and the pixels end early.
        cut = data[:content] + (8).to_bytes(4, "big") + b"free" + data[content + size :]
        with pytest.raises(DecodeError):
            probe(io.BytesIO(cut))


# Numbers of the frames that an AVI has; the others were dropped in recording.
GAPS = {
    "none": range(20),
    "two of three": range(0, 60, 3),
    "a pause": [*range(10), *range(50, 60)],
    "the second one": [0, *range(2, 20)],
    "most of the start": [0, *range(40, 50)],
}


@pytest.mark.parametrize("numbers", GAPS.values(), ids=GAPS)
def test_probe_avi_with_dropped_frames_is_whole(photos, numbers):
    """Empty frames are declared, but not missing; the same file cut off is damaged."""
    data = make_avi_with_gaps(photos[0], numbers)
    assert probe(io.BytesIO(data)).video.frames == len(numbers)
    assert len(read_all(data)) == len(numbers)
    with pytest.raises(DecodeError, match="the video ends after|are corrupt"):
        probe(io.BytesIO(data[: data.index(b"movi") + (len(data) - data.index(b"movi")) // 2]))


def test_probe_avi_that_starts_late_is_whole_or_truncated(photos):
    """Frames before the declared start are not dropped ones: the file cut off is damaged."""
    data = bytearray(make_avi_with_gaps(photos[0], range(50)))
    start = data.index(b"strh") + 36
    data[start : start + 4] = (20).to_bytes(4, "little")
    assert probe(io.BytesIO(data)).video.frames == 50
    cut = [position for position in range(len(data)) if data[position : position + 4] == b"00dc"][30]
    with pytest.raises(DecodeError, match="the video ends after"):
        probe(io.BytesIO(data[:cut]))


@pytest.mark.parametrize("container_format", ["mp4", "mov", "matroska", "mpegts", "flv"])
@pytest.mark.parametrize("first", [1, 10, 29])
def test_probe_video_cut_before_a_key_frame_is_whole(container_format, first):
    """Frames before the first key frame cannot be decoded, and their absence is no damage."""
    whole = make_street_video(60)
    num_decodable = 60 - probe(io.BytesIO(whole)).video.key_frames[1]
    data = copy_packets(whole, container_format, first, 60)
    assert probe(io.BytesIO(data)).video.frames == num_decodable
    assert np.array_equal(read_all(data), read_all(whole)[-num_decodable:])


def make_late_key_frame(photo, num_empty):
    """Return an MP4 whose 29 first frames are decoded without a key frame, and whose last frames are empty."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=25, options={"g": "30"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        frames = [av.VideoFrame.from_image(photo.resize((96, 64)).rotate(number / 10)) for number in range(60)]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        for number, packet in enumerate(packets[1:], 1):
            if number >= 60 - num_empty:
                empty = av.Packet(b"\0\0\1\xb6\x50\x4f")
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                packet = empty
                packet.stream = stream
            output.mux(packet)
    return file.getvalue()


def test_probe_frames_decoded_before_a_key_frame_count(photos):
    """Frames that a decoder reads without a key frame do not excuse others that are missing."""
    assert probe(io.BytesIO(make_late_key_frame(photos[0], 0))).video.frames == 59
    with pytest.raises(DecodeError, match="only 3[0-9] of 59 frames can be decoded"):
        probe(io.BytesIO(make_late_key_frame(photos[0], 25)))


# --- orientation

# Display matrices (a, b, c, d), and the EXIF orientation of the same effect.
MATRICES = {
    "upright": ((1, 0, 0, 1), 1),
    "mirrored": ((-1, 0, 0, 1), 2),
    "upside down": ((-1, 0, 0, -1), 3),
    "flipped": ((1, 0, 0, -1), 4),
    "transposed": ((0, 1, 1, 0), 5),
    "turned right": ((0, 1, -1, 0), 6),
    "transverse": ((0, -1, -1, 0), 7),
    "turned left": ((0, -1, 1, 0), 8),
    "scaled": ((2, 0, 0, 2), 1),
    "turned by 80 degrees": ((0.17, 0.98, -0.98, 0.17), 6),
    "mirrored and turned by 10 degrees": ((-0.98, 0.17, 0.17, 0.98), 2),
    "zero": ((0, 0, 0, 0), 1),
    "flat": ((1, 0, 0, 0), 1),
}


@pytest.mark.parametrize(("matrix", "orientation"), MATRICES.values(), ids=MATRICES)
def test_readers_apply_the_whole_display_matrix(matrix, orientation):
    """Sequential reading, clips and the probe turn and mirror frames by the matrix."""
    assert orientation_of_matrix(*matrix) == orientation
    stored = make_street_video(4)
    expected = [to_upright(frame, orientation) for frame in read_all(stored)]
    data = with_display_matrix(stored, *matrix)
    video = probe(io.BytesIO(data)).video
    assert (video.height, video.width) == expected[0].shape[:2]
    assert np.array_equal(read_all(data), expected)
    assert np.array_equal(read_clip(data, 0, 4), expected)


def test_orientation_of_matrix_moves_pixels_as_the_matrix():
    """A pixel lands where its matrix sends it, relative to the others."""
    pixels = np.arange(6).reshape(2, 3)
    for (a, b, c, d), orientation in list(MATRICES.values())[:8]:
        y, x = np.mgrid[:2, :3]
        shown_x, shown_y = a * x + c * y, b * x + d * y
        expected = np.empty((np.ptp(shown_y) + 1, np.ptp(shown_x) + 1), int)
        expected[shown_y - shown_y.min(), shown_x - shown_x.min()] = pixels
        assert np.array_equal(to_upright(pixels, orientation), expected)


# --- pixels that are not square

# Width of a pixel in units of its height, and the displayed size of 96 x 64 stored pixels.
ASPECTS = {
    "wide": (Fraction(2), (192, 64)),
    "narrow": (Fraction(1, 2), (96, 128)),
    "DVD, wide screen": (Fraction(64, 45), (137, 64)),
    "CIF": (Fraction(12, 11), (105, 64)),
    "square": (Fraction(1), (96, 64)),
    "broken": (Fraction(200), (96, 64)),
}


@pytest.mark.parametrize("container_format", ["mp4", "mpegts"])
@pytest.mark.parametrize(("aspect", "size"), ASPECTS.values(), ids=ASPECTS)
def test_readers_return_square_pixels(photos, aspect, size, container_format):
    """The displayed shape is kept; no stored pixel is lost."""
    data = make_video(photos[0], steady(40), container_format, aspect)
    video, clip = read_video(io.BytesIO(data)), probe(io.BytesIO(data)).video
    frames = list(video.frames)
    assert video.size == (clip.width, clip.height) == frames[0].shape[1::-1] == size
    assert np.array_equal(read_clip(data, 5, 3), frames[5:8])
    stored = photos[0].resize((96, 64)).resize(size)
    assert np.abs(frames[0].astype(int) - np.asarray(stored)).mean() < 8


def test_transcode_shrinks_displayed_shape(photos):
    """`max_side` counts pixels of display, and turned wide pixels stay wide."""
    data = make_video(photos[0], steady(40), "mp4", Fraction(2))
    stored = transcode_if_needed(data, "mp4", 96, 1)
    assert (stored.video.width, stored.video.height) == (96, 32)
    turned = probe(io.BytesIO(with_display_matrix(data, 0, 1, -1, 0))).video
    assert (turned.width, turned.height) == (64, 192)


# --- colors

# Matrix (H.273; 2 is unspecified), values from 0 to 255, size, and weights of red and blue in luma.
COLORS = {
    "BT.601": (6, False, (64, 48), (0.299, 0.114)),
    "BT.601, PAL": (5, False, (64, 48), (0.299, 0.114)),
    "BT.709": (1, False, (64, 48), (0.2126, 0.0722)),
    "BT.2020": (9, False, (64, 48), (0.2627, 0.0593)),
    "SMPTE 240M": (7, False, (64, 48), (0.212, 0.087)),
    "BT.709, full range": (1, True, (64, 48), (0.2126, 0.0722)),
    "BT.601, full range": (6, True, (64, 48), (0.299, 0.114)),
    "unspecified": (2, False, (64, 48), (0.299, 0.114)),
    "unspecified, HD": (2, False, (64, 720), (0.2126, 0.0722)),
    "BT.601 in HD": (6, False, (64, 720), (0.299, 0.114)),
}


@pytest.mark.parametrize(("matrix", "full_range", "size", "weights"), COLORS.values(), ids=COLORS)
def test_readers_convert_colors_by_matrix_and_range(matrix, full_range, size, weights):
    """Strong colors become the RGB of the standard, within rounding, in both readers."""
    red, blue = weights
    for rgb in ((200, 60, 40), (40, 180, 90), (70, 60, 210), (128, 128, 128)):
        r, g, b = (value / 255 for value in rgb)
        luma = red * r + (1 - red - blue) * g + blue * b
        cb, cr = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
        y_scale, y_offset, c_scale = (255, 0, 255) if full_range else (219, 16, 224)
        values = [round(y_scale * luma + y_offset), round(c_scale * cb + 128), round(c_scale * cr + 128)]
        data = make_flat_video(*values, size, matrix, full_range)
        [frame] = read_all(data)
        assert np.abs(frame.astype(int) - rgb).max() <= 3
        assert np.array_equal(read_clip(data, 0, 1)[0], frame)
