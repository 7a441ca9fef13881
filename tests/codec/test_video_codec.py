"""Clips: every frame exactly, any frame alone, regions, first parts, and video files in and out."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from small_codecs import save_clip_codec

from bsq_ray import Codec
from bsq_ray.codec.container import read_container, read_header
from bsq_ray.codec.files import DecodeSelection, compress_file, decompress_file
from bsq_ray.media.color import SRGB, ColorDescription
from bsq_ray.media.video_reader import read_video
from bsq_ray.media.video_writer import write_video

RATE = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def carphone(video_folders):
    """A real clip, 176 x 144 pixels."""
    return video_folders[1] / "carphone_pristine.mp4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip_codec(tmp_path_factory.mktemp("clip") / "prior")


@pytest.fixture(scope="module")
def clip_codec(folder):
    return Codec.from_pretrained(folder)


@pytest.fixture(scope="module")
def raw_clip_codec(folder):
    return Codec.from_pretrained(f"{folder}/tokenizer")


@pytest.fixture(scope="module")
def frames(carphone):
    """Eleven frames of a real clip, 88 x 72: two groups of pictures and most of a third."""
    video = read_video(str(carphone))
    originals = [frame for frame, _ in zip(video.frames, range(11), strict=False)]
    return [np.asarray(Image.fromarray(frame).resize((88, 72))) for frame in originals]


@pytest.fixture(scope="module")
def data(clip_codec, frames):
    return clip_codec.compress_clip(frames, RATE, ColorDescription(1, 1, 1, 0)).data


@pytest.fixture(scope="module")
def decoded(clip_codec, data):
    return list(clip_codec.decompress_clip(data))


@pytest.mark.parametrize("rate", [0, -25, Fraction(29.97)])
def test_compress_clip_invalid_rate_raises(raw_clip_codec, frames, rate):
    with pytest.raises(ValueError, match="must be positive, its numerator and denominator below"):
        raw_clip_codec.compress_clip(frames, rate)


def test_compress_clip_roundtrip_keeps_rate_and_color(clip_codec, raw_clip_codec, frames, data, decoded):
    clip = read_container(data, clip_codec.token_format).header.clip
    assert (clip.num_frames, clip.gop_size, clip.frame_rate, clip.color) == (11, 4, RATE, (1, 1, 1, 0))
    assert [frame.shape for frame in decoded] == [(72, 88, 3)] * 11
    raw = raw_clip_codec.compress_clip(frames, RATE)
    assert read_header(raw.data).clip.color == SRGB
    assert raw.num_frames == 11
    assert raw.bits_per_pixel == 8 * len(raw.data) / (88 * 72 * 11)
    for here, there in zip(decoded, raw_clip_codec.decompress_clip(raw.data), strict=True):
        assert (here == there).all(), "with and without a prior the pixels agree"


@pytest.mark.parametrize("batch", [1, 7])
def test_decompress_clip_batch_size_does_not_matter(folder, data, decoded, batch):
    other = Codec.from_pretrained(folder, batch_size=batch)
    assert (np.stack(list(other.decompress_clip(data))) == np.stack(decoded)).all()


@pytest.mark.parametrize("frame", [0, 3, 4, 6, 10])
def test_decompress_clip_single_frame_reads_only_its_gop(clip_codec, data, decoded, frame):
    """The payloads of all others may be anything."""
    container = read_container(data, clip_codec.token_format)
    damaged = bytearray(data)
    for number in range(container.header.num_groups):
        if number // container.header.groups_per_gop != frame // 4:
            start = int(container.offsets_G[number])
            damaged[start : start + int(container.sizes_G[number])] = bytes(int(container.sizes_G[number]))
    [alone] = clip_codec.decompress_clip(bytes(damaged), range(frame, frame + 1))
    assert (alone == decoded[frame]).all()
    with pytest.raises(ValueError, match="does not match its checksum"):
        list(clip_codec.decompress_clip(bytes(damaged)))


def test_decompress_clip_decodes_only_earlier_frames_of_gop(clip_codec, data, monkeypatch):
    """Decoding one frame of a GOP decodes only the tokens of that frame and the frames before it."""
    steps = []
    start = clip_codec.prior.start_decoding
    monkeypatch.setattr(clip_codec.prior, "start_decoding", lambda b, n: steps.append(n) or start(b, n))
    list(clip_codec.decompress_clip(data, range(5, 6)))
    assert set(steps) == {2 * 4}, "tokens of two frames of four"


def test_decompress_clip_frame_range_and_region(clip_codec, data, decoded):
    part = list(clip_codec.decompress_clip(data, range(2, 9), region=(20, 10, 50, 33)))
    assert len(part) == 7
    assert all((here == whole[10:33, 20:50]).all() for here, whole in zip(part, decoded[2:9], strict=True))
    for invalid_range in (range(3, 12), range(4, 4), range(-1, 3)):
        with pytest.raises(ValueError, match="do not exist; the clip has 0 to 10"):
            clip_codec.decompress_clip(data, invalid_range)


def test_preview_clip_truncated_file_shows_first_frames(clip_codec, data, decoded):
    preview, num_available = clip_codec.preview_clip(data[: len(data) * 2 // 3])
    assert 4 <= num_available <= 8
    preview = list(preview)
    assert len(preview) == num_available
    assert all((here == whole).all() for here, whole in zip(preview[:4], decoded, strict=False))
    assert clip_codec.preview_clip(data)[1] == 11


def test_codec_distinguishes_images_and_clips(clip_codec, codec, data, frames):
    with pytest.raises(ValueError, match="contains a clip of 11 frames"):
        clip_codec.decompress(data)
    image = clip_codec.compress(Image.fromarray(frames[0]))
    assert clip_codec.decompress(image.data).size == (88, 72)
    with pytest.raises(ValueError, match="contains an image"):
        clip_codec.decompress_clip(image.data)
    single = codec.compress_clip(frames[:3], 25)
    assert read_header(single.data).clip.gop_size == 1, "a tokenizer of images takes frame after frame"
    assert len(list(codec.decompress_clip(single.data))) == 3


def test_codec_non_causal_tokenizer_rejects_images(clip_codec, tmp_path, frames):
    from bsq_ray import Tokenizer

    non_causal = Tokenizer(clip_codec.tokenizer.config.model_copy(update={"causal": False}))
    non_causal.save_pretrained(str(tmp_path))
    codec = Codec.from_pretrained(str(tmp_path))
    data = codec.compress_clip(frames[:6], 25).data
    whole = list(codec.decompress_clip(data))
    [alone] = codec.decompress_clip(data, range(1, 2))
    assert (alone == whole[1]).all()
    with pytest.raises(ValueError, match="takes clips only"):
        codec.compress(Image.fromarray(frames[0]))


def test_compress_clip_invalid_frames_raise(clip_codec, frames):
    with pytest.raises(ValueError, match="has no frames"):
        clip_codec.compress_clip([], 25)
    for cut in (2, 5):
        with pytest.raises(ValueError, match="must have the same size"):
            clip_codec.compress_clip([*frames[:cut], frames[0][:-1]], 25)
    with pytest.raises(ValueError, match="must be uint8"):
        clip_codec.compress_clip([frames[0] / 255], 25)


def test_write_video_lossless_roundtrip(decoded, tmp_path):
    path = str(tmp_path / "a.mkv")
    assert write_video(path, "matroska", iter(decoded), RATE, SRGB) == 11
    video = read_video(path)
    assert video.frame_rate == RATE
    assert (np.stack(list(video.frames)) == np.stack(decoded)).all()


@pytest.mark.parametrize("size", [(88, 72), (87, 71)])
@pytest.mark.parametrize(
    "color", [ColorDescription(1, 1, 1, 0), ColorDescription(9, 16, 9, 0), ColorDescription(1, 13, 0, 1)]
)
def test_write_video_mp4_is_close_and_keeps_color_tags(frames, tmp_path, size, color):
    """An MP4 is close to the frames and carries their color tags."""
    path = str(tmp_path / "a.mp4")
    sized = [np.asarray(Image.fromarray(frame).resize(size)) for frame in frames]
    write_video(path, "mp4", iter(sized), RATE, color)
    video = read_video(path)
    assert video.color == color._replace(matrix=color.matrix or 1)
    difference = np.stack(list(video.frames)).astype(int) - np.stack(sized)
    assert np.abs(difference).mean() < 3


def test_read_video_applies_rotation_matrix(tmp_path, frames):
    """Write a video as phones do: the display matrix of the track rotates by a quarter turn clockwise."""
    path = tmp_path / "turned.mp4"
    write_video(str(path), "mp4", iter(frames), RATE, ColorDescription(1, 1, 1, 0))
    unrotated_frame = next(read_video(str(path)).frames)
    content = path.read_bytes()
    identity_matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    rotation_matrix = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 72 * 65536, 0, 2**30)
    track = content.index(b"tkhd")
    path.write_bytes(content[:track] + content[track:].replace(identity_matrix, rotation_matrix, 1))
    assert (next(read_video(str(path)).frames) == np.rot90(unrotated_frame, 3)).all()


def test_files_video_to_bsq_to_videos_and_images(folder, carphone, tmp_path):
    coded = str(tmp_path / "a.bsq")
    with av.open(str(carphone)) as source, av.open(str(tmp_path / "short.mkv"), "w") as short:
        stream = short.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for frame, _ in zip(source.decode(video=0), range(9), strict=False):
            short.mux(stream.encode(frame.reformat(format="yuv420p")))
        short.mux(stream.encode())
    summary = compress_file(folder, str(tmp_path / "short.mkv"), coded)
    assert "9 frames of 176 x 144 px at 29.97 fps" in summary
    assert "bits per pixel" in summary
    assert "9 frames" in decompress_file(folder, coded, str(tmp_path / "b.mkv"))
    decompress_file(folder, coded, str(tmp_path / "b.mp4"))
    frames = list(read_video(str(tmp_path / "b.mkv")).frames)
    assert read_video(str(tmp_path / "b.mp4")).frame_rate == RATE
    decompress_file(folder, coded, str(tmp_path / "5.png"), DecodeSelection(frame=5))
    assert (np.asarray(Image.open(tmp_path / "5.png")) == frames[5]).all()
    decompress_file(folder, coded, str(tmp_path / "s.webp"), DecodeSelection(time_s=0.2, region=(0, 0, 30, 20)))
    assert (np.asarray(Image.open(tmp_path / "s.webp").convert("RGB")) == frames[5][:20, :30]).all()
    (tmp_path / "cut.bsq").write_bytes((tmp_path / "a.bsq").read_bytes()[:-100])
    summary = decompress_file(folder, str(tmp_path / "cut.bsq"), str(tmp_path / "p.mkv"), DecodeSelection(preview=True))
    assert "9 frames, 9 of 9 frames available" in summary
    for part, out, message in (
        (DecodeSelection(), "x.png", "this is a clip, so OUT must end in .mp4 or .mkv"),
        (DecodeSelection(frame=2), "x.mp4", "this is an image or one frame"),
        (DecodeSelection(frame=9), "x.png", "no frame 9: the clip has frames 0 to 8"),
        (DecodeSelection(time_s=-1.0), "x.png", "no frame -30"),
    ):
        with pytest.raises(ValueError, match=message):
            decompress_file(folder, coded, str(tmp_path / out), part)
    with pytest.raises(ValueError, match="choose one of"):
        DecodeSelection(frame=1, preview=True)


def test_compress_file_invalid_video_raises(folder, carphone, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(ValueError, match=r"a.mp4: not a video of a known format"):
        compress_file(folder, str(tmp_path / "a.mp4"), str(tmp_path / "a.bsq"))
    content = carphone.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut.mp4: "):
        compress_file(folder, str(tmp_path / "cut.mp4"), str(tmp_path / "a.bsq"))
