"""Clips: every frame exactly, any frame alone, regions, first parts, and video files in and out."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from small_codecs import save_clip_codec

from bsq_ray import Codec
from bsq_ray.codec.container import read_container
from bsq_ray.codec.files import Part, compress_file, decompress_file
from bsq_ray.media.color import SRGB, Colour
from bsq_ray.media.video_files import read_video, write_video

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
    taken = [frame for frame, _ in zip(video.frames, range(11), strict=False)]
    return [np.asarray(Image.fromarray(frame).resize((88, 72))) for frame in taken]


@pytest.fixture(scope="module")
def data(clip_codec, frames):
    return clip_codec.compress_clip(frames, RATE, Colour(1, 1, 1, 0)).data


@pytest.fixture(scope="module")
def decoded(clip_codec, data):
    return list(clip_codec.decompress_clip(data))


@pytest.mark.parametrize("rate", [0, -25, Fraction(29.97)])
def test_a_rate_that_no_file_can_hold_is_refused(raw_clip_codec, frames, rate):
    with pytest.raises(ValueError, match="must be positive, its numerator and denominator below"):
        raw_clip_codec.compress_clip(frames, rate)


def test_a_clip_comes_back_frame_by_frame_with_rate_and_colour(raw_clip_codec, frames, data, decoded):
    clip = read_container(data).header.clip
    assert (clip.frames, clip.gop, clip.rate, clip.colour) == (11, 4, RATE, (1, 1, 1, 0))
    assert [frame.shape for frame in decoded] == [(72, 88, 3)] * 11
    raw = raw_clip_codec.compress_clip(frames, RATE)
    assert read_container(raw.data).header.clip.colour == SRGB
    assert raw.frames == 11
    assert raw.bits_per_pixel == 8 * len(raw.data) / (88 * 72 * 11)
    for here, there in zip(decoded, raw_clip_codec.decompress_clip(raw.data), strict=True):
        assert (here == there).all(), "with and without a prior the pixels agree"


@pytest.mark.parametrize("batch", [1, 7])
def test_batches_do_not_matter(folder, data, decoded, batch):
    other = Codec.from_pretrained(folder, batch=batch)
    assert (np.stack(list(other.decompress_clip(data))) == np.stack(decoded)).all()


@pytest.mark.parametrize("frame", [0, 3, 4, 6, 10])
def test_a_frame_alone_needs_only_its_group_of_pictures(clip_codec, data, decoded, frame):
    """The payloads of all others may be anything."""
    container = read_container(data)
    damaged = bytearray(data)
    for number in range(len(container.index_GE)):
        if number // container.header.gop_groups != frame // 4:
            start = int(container.starts_G[number])
            damaged[start : start + int(container.index_GE[number, 0])] = bytes(int(container.index_GE[number, 0]))
    [alone] = clip_codec.decompress_clip(bytes(damaged), range(frame, frame + 1))
    assert (alone == decoded[frame]).all()
    with pytest.raises(ValueError, match="does not match its checksum"):
        list(clip_codec.decompress_clip(bytes(damaged)))


def test_of_a_group_of_pictures_only_what_comes_before_is_decoded(clip_codec, data, monkeypatch):
    steps = []
    start = clip_codec.prior.start_decoding
    monkeypatch.setattr(clip_codec.prior, "start_decoding", lambda b, n: steps.append(n) or start(b, n))
    list(clip_codec.decompress_clip(data, range(5, 6)))
    assert set(steps) == {2 * 4}, "tokens of two frames of four"


def test_some_frames_and_a_region(clip_codec, data, decoded):
    part = list(clip_codec.decompress_clip(data, range(2, 9), region=(20, 10, 50, 33)))
    assert len(part) == 7
    assert all((here == whole[10:33, 20:50]).all() for here, whole in zip(part, decoded[2:9], strict=True))
    for wanted in (range(3, 12), range(4, 4), range(-1, 3)):
        with pytest.raises(ValueError, match="the clip has 0 to 10"):
            clip_codec.decompress_clip(data, wanted)


def test_the_first_part_of_a_file_shows_the_first_frames(clip_codec, data, decoded):
    shown, there = clip_codec.preview_clip(data[: len(data) * 2 // 3])
    assert 4 <= there <= 8
    shown = list(shown)
    assert len(shown) == there
    assert all((here == whole).all() for here, whole in zip(shown[:4], decoded, strict=False))
    assert clip_codec.preview_clip(data)[1] == 11


def test_images_and_clips_are_told_apart(clip_codec, codec, data, frames):
    with pytest.raises(ValueError, match="holds a clip of 11 frames"):
        clip_codec.decompress(data)
    image = clip_codec.compress(Image.fromarray(frames[0]))
    assert clip_codec.decompress(image.data).size == (88, 72)
    with pytest.raises(ValueError, match="holds an image"):
        clip_codec.decompress_clip(image.data)
    single = codec.compress_clip(frames[:3], 25)
    assert read_container(single.data).header.clip.gop == 1, "a tokenizer of images takes frame after frame"
    assert len(list(codec.decompress_clip(single.data))) == 3


def test_a_tokenizer_that_looks_ahead_takes_whole_clips_only(clip_codec, tmp_path, frames):
    from bsq_ray import Tokenizer

    looking = Tokenizer(clip_codec.tokenizer.config.model_copy(update={"causal": False}))
    looking.save_pretrained(str(tmp_path))
    codec = Codec.from_pretrained(str(tmp_path))
    data = codec.compress_clip(frames[:6], 25).data
    whole = list(codec.decompress_clip(data))
    [alone] = codec.decompress_clip(data, range(1, 2))
    assert (alone == whole[1]).all()
    with pytest.raises(ValueError, match="takes clips only"):
        codec.compress(Image.fromarray(frames[0]))


def test_frames_that_cannot_be_a_clip_are_refused(clip_codec, frames):
    with pytest.raises(ValueError, match="has no frames"):
        clip_codec.compress_clip([], 25)
    for cut in (2, 5):
        with pytest.raises(ValueError, match="must all have one size"):
            clip_codec.compress_clip([*frames[:cut], frames[0][:-1]], 25)
    with pytest.raises(ValueError, match="must be uint8"):
        clip_codec.compress_clip([frames[0] / 255], 25)


def test_a_lossless_video_keeps_every_byte(decoded, tmp_path):
    path = str(tmp_path / "a.mkv")
    assert write_video(path, "matroska", iter(decoded), RATE, SRGB) == 11
    again = read_video(path)
    assert again.frame_rate == RATE
    assert (np.stack(list(again.frames)) == np.stack(decoded)).all()


@pytest.mark.parametrize("size", [(88, 72), (87, 71)])
@pytest.mark.parametrize("colour", [Colour(1, 1, 1, 0), Colour(9, 16, 9, 0), Colour(1, 13, 0, 1)])
def test_an_mp4_looks_like_the_frames_and_says_how_its_colours_are_meant(frames, tmp_path, size, colour):
    path = str(tmp_path / "a.mp4")
    sized = [np.asarray(Image.fromarray(frame).resize(size)) for frame in frames]
    write_video(path, "mp4", iter(sized), RATE, colour)
    again = read_video(path)
    assert again.color == colour._replace(matrix=colour.matrix or 1)
    difference = np.stack(list(again.frames)).astype(int) - np.stack(sized)
    assert np.abs(difference).mean() < 3


def test_a_video_held_upright_is_turned(tmp_path, frames):
    """As telephones write it: the track's matrix says a quarter clockwise."""
    path = tmp_path / "turned.mp4"
    write_video(str(path), "mp4", iter(frames), RATE, Colour(1, 1, 1, 0))
    lying = next(read_video(str(path)).frames)
    content = path.read_bytes()
    unturned = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 72 * 65536, 0, 2**30)
    track = content.index(b"tkhd")
    path.write_bytes(content[:track] + content[track:].replace(unturned, turned, 1))
    assert (next(read_video(str(path)).frames) == np.rot90(lying, 3)).all()


def test_files_from_video_to_video_and_pictures(folder, carphone, tmp_path):
    coded = str(tmp_path / "a.bsq")
    with av.open(str(carphone)) as source, av.open(str(tmp_path / "short.mkv"), "w") as short:
        stream = short.add_stream("ffv1", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for frame, _ in zip(source.decode(video=0), range(9), strict=False):
            short.mux(stream.encode(frame.reformat(format="yuv420p")))
        short.mux(stream.encode())
    told = compress_file(folder, str(tmp_path / "short.mkv"), coded)
    assert "9 frames of 176 x 144 px at 29.97 a second" in told
    assert "bits per pixel" in told
    assert "9 frames" in decompress_file(folder, coded, str(tmp_path / "b.mkv"))
    decompress_file(folder, coded, str(tmp_path / "b.mp4"))
    frames = list(read_video(str(tmp_path / "b.mkv")).frames)
    assert read_video(str(tmp_path / "b.mp4")).frame_rate == RATE
    decompress_file(folder, coded, str(tmp_path / "5.png"), Part(frame=5))
    assert (np.asarray(Image.open(tmp_path / "5.png")) == frames[5]).all()
    decompress_file(folder, coded, str(tmp_path / "s.webp"), Part(second=0.2, region=(0, 0, 30, 20)))
    assert (np.asarray(Image.open(tmp_path / "s.webp").convert("RGB")) == frames[5][:20, :30]).all()
    (tmp_path / "cut.bsq").write_bytes((tmp_path / "a.bsq").read_bytes()[:-100])
    told = decompress_file(folder, str(tmp_path / "cut.bsq"), str(tmp_path / "p.mkv"), Part(preview=True))
    assert "9 frames, 9 of 9 frames there" in told
    for part, out, message in (
        (Part(), "x.png", "this is a clip, so OUT must end in .mp4 or .mkv"),
        (Part(frame=2), "x.mp4", "this is an image or one frame"),
        (Part(frame=9), "x.png", "no frame 9: the clip has 9 frames"),
        (Part(second=-1.0), "x.png", "no frame -30"),
    ):
        with pytest.raises(ValueError, match=message):
            decompress_file(folder, coded, str(tmp_path / out), part)
    with pytest.raises(ValueError, match="choose one of"):
        Part(frame=1, preview=True)


def test_what_is_no_video_is_named(folder, carphone, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing" * 100)
    with pytest.raises(ValueError, match=r"a.mp4: not a video of a known format"):
        compress_file(folder, str(tmp_path / "a.mp4"), str(tmp_path / "a.bsq"))
    content = carphone.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut.mp4: "):
        compress_file(folder, str(tmp_path / "cut.mp4"), str(tmp_path / "a.bsq"))
