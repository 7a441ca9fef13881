"""Standard codecs: valid files, more bits for a higher quality, and the paper's settings."""

import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from bsq_ray.evaluation.compression.clip_files import StoredPlanes, VideoClip, read_video_clip
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.media.color import planes_to_rgb

MAGIC = {
    "JPEG": (b"\xff\xd8\xff", 0),
    "JPEG 2000": (b"jP  ", 4),
    "WebP": (b"WEBP", 8),
    "AVIF": (b"ftypavif", 4),
    "JPEG XL": (b"\xff\x0a", 0),
}


def error(first, second):
    return float(((np.asarray(first).astype(float) - np.asarray(second).astype(float)) ** 2).mean())


def test_standard_codecs_include_all_five():
    assert standard_codecs().keys() == MAGIC.keys()


@pytest.mark.parametrize("name", MAGIC)
def test_image_codec_higher_quality_costs_more_bits(name, photos):
    """Each file has the signature of its format, and a higher quality gives a larger file with a smaller error."""
    photo = photos[1].resize((200, 150))
    codec = standard_codecs()[name]
    files = [codec.encode(photo, quality) for quality in codec.qualities]
    magic, offset = MAGIC[name]
    assert all(data[offset : offset + len(magic)] == magic for data in files)
    sizes = [len(data) for data in files]
    assert sizes == sorted(sizes)
    errors = [error(codec.decode(data), photo) for data in files]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 150 < errors[0]
    if name != "JPEG XL":
        assert Image.open(io.BytesIO(files[0])).convert("RGB").tobytes() == codec.decode(files[0]).tobytes()


@pytest.mark.parametrize("name", MAGIC)
def test_image_codec_writes_no_color_profile(name, photos):
    """A file has the same size for an image with and without a color profile."""
    photo = photos[1].resize((64, 48))
    tagged = photo.copy()
    tagged.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    codec = standard_codecs()[name]
    assert codec.encode(tagged, codec.qualities[0]) == codec.encode(photo, codec.qualities[0])


@pytest.fixture(scope="module")
def clip(video_folders):
    return read_video_clip(str(video_folders[1] / "carphone_pristine.mp4"), max_frames=8)


@pytest.mark.parametrize("name", ["H.264", "HEVC", "AV1"])
def test_video_codec_higher_quality_costs_more_bits(name, clip):
    """A higher quality gives a larger file with a smaller error, and FFmpeg can read the file."""
    codec = standard_video_codecs()[name]
    files = [codec.encode(clip, quality) for quality in (codec.qualities[0], codec.qualities[-1])]
    decoded = [codec.decode(data) for data in files]
    assert all(frames.shape == clip.frames_THW3.shape for frames in decoded)
    assert len(files[0]) < len(files[1])
    assert error(decoded[0], clip.frames_THW3) > 3 * error(decoded[1], clip.frames_THW3)
    with av.open(io.BytesIO(files[0])) as file:
        assert file.streams.video[0].codec_context.name in ("h264", "hevc", "libdav1d", "av1")


@pytest.mark.parametrize("name", ["H.264", "HEVC"])
def test_video_codec_uses_the_papers_settings(name, clip):
    """Both encoders write their settings into the stream."""
    data = standard_video_codecs()[name].encode(clip, 37)
    assert b"bframes=0" in data
    assert b"crf=37.0" in data
    # Settings of the preset "medium".
    assert (b"subme=7" if name == "H.264" else b"subme=2") in data
    if name == "H.264":
        assert b" threads=4" in data
        assert b"sliced_threads=0" in data


@pytest.mark.parametrize("full_range", [False, True])
def test_video_codec_encodes_stored_planes_as_they_are(clip, full_range):
    """A clip that is stored as 4:2:0 is not converted to RGB and back: a lossless codec returns it exactly."""
    planes = clip.stored.planes_TPW
    color = clip.stored.color._replace(full_range=int(full_range), matrix=6)
    frames_THW3 = np.stack([planes_to_rgb(planes_PW, color) for planes_PW in planes])
    source = VideoClip(frames_THW3, clip.frame_rate, StoredPlanes(planes, color))
    lossless = replace(standard_video_codecs()["H.264"], options={"preset": "ultrafast"})
    assert np.array_equal(lossless.decode(lossless.encode(source, 0)), source.frames_THW3)
    from_rgb = lossless.decode(lossless.encode(replace(source, stored=None), 0))
    assert 0.1 < error(from_rgb, source.frames_THW3) < 3


@pytest.mark.parametrize("height", [144, 720])
def test_video_codec_of_rgb_frames_keeps_brightness(photos, height):
    """Frames that are stored as RGB are converted with the matrix that the decoder uses, without darkening."""
    pixels_HW3 = np.asarray(photos[0].resize((160, height)))
    source = VideoClip(pixels_HW3[None], Fraction(25))
    lossless = replace(standard_video_codecs()["H.264"], options={"preset": "ultrafast"})
    decoded = lossless.decode(lossless.encode(source, 0))
    assert np.abs((decoded.astype(float) - pixels_HW3).mean((0, 1, 2))).max() < 0.3
