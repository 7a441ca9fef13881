"""Test the commands: files, pipes, regions, and messages for mistakes."""

import io
import shutil
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from small_codecs import save_codec
from small_models import retrain_decoder, save_tokenizer

from bsq_ray import Prior, Tokenizer, config
from bsq_ray.codec.files import DecodeSelection, compress_file, decompress_file
from bsq_ray.codec.header import VideoHeader
from bsq_ray.media.color import SRGB
from bsq_ray.media.video_reader import read_video
from bsq_ray.media.video_writer import write_video


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 0)


@pytest.fixture(scope="module")
def photo(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    photos[0].resize((90, 60)).save(path)
    return str(path)


def test_compress_file_roundtrip(model, photo, tmp_path):
    coded, decoded = str(tmp_path / "a.bsq"), str(tmp_path / "a.webp")
    summary = compress_file(model, photo, coded)
    assert "90 x 60 px in" in summary
    assert "bits per pixel" in summary
    assert "90 x 60 px" in decompress_file(model, coded, decoded)
    decompress_file(model, coded, str(tmp_path / "a.png"))
    whole = Image.open(tmp_path / "a.png").convert("RGB")
    assert Image.open(decoded).convert("RGB").tobytes() == whole.tobytes()
    decompress_file(model, coded, str(tmp_path / "part.png"), DecodeSelection(region=(10, 10, 30, 20)))
    assert Image.open(tmp_path / "part.png").size == (20, 10)


def test_files_truncated_previews_and_animation_raises(model, photo, tmp_path):
    coded = str(tmp_path / "a.bsq")
    compress_file(model, photo, coded)
    (tmp_path / "cut.bsq").write_bytes((tmp_path / "a.bsq").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut.bsq: the file is truncated"):
        decompress_file(model, str(tmp_path / "cut.bsq"), str(tmp_path / "x.png"))
    summary = decompress_file(model, str(tmp_path / "cut.bsq"), str(tmp_path / "x.png"), DecodeSelection(preview=True))
    assert "90 x 60 px, 0% of it available" in summary
    frames = [Image.open(photo), Image.new("RGB", (90, 60))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="it is an animation"):
        compress_file(model, str(tmp_path / "a.webp"), coded)


def test_compress_file_photo_with_preview_is_an_image(model, photo, tmp_path):
    """A JPEG with a second image, as phones write it, is compressed like the first one alone."""
    plain, with_preview = tmp_path / "a.jpg", tmp_path / "b.jpg"
    image = Image.open(photo).convert("RGB")
    image.save(plain, "JPEG", quality=90)
    image.save(with_preview, "MPO", save_all=True, append_images=[image.resize((9, 6))], quality=90)
    for path in (plain, with_preview):
        compress_file(model, str(path), f"{path}.bsq")
    assert (tmp_path / "a.jpg.bsq").read_bytes() == (tmp_path / "b.jpg.bsq").read_bytes()


@pytest.mark.parametrize("has_prior", [False, True])
def test_decompress_file_of_earlier_decoder_adds_remark(model, photo, tmp_path, has_prior):
    """A tokenizer with the same tokens decodes the file to its own pixels; one with other tokens does not."""
    first = save_codec(tmp_path / "prior") if has_prior else model
    second = shutil.copytree(first, tmp_path / "second")
    tokenizer = "tokenizer" if has_prior else "."
    retrain_decoder(f"{first}/{tokenizer}", second / tokenizer)
    if has_prior:
        _store_tokens_id(first, second)
    compress_file(str(first), photo, str(tmp_path / "first.bsq"))
    summary = decompress_file(str(second), str(tmp_path / "first.bsq"), str(tmp_path / "first.png"))
    assert "written with another decoder of the same tokens" in summary
    compress_file(str(second), photo, str(tmp_path / "second.bsq"))
    assert "another decoder" not in decompress_file(
        str(second), str(tmp_path / "second.bsq"), str(tmp_path / "second.png")
    )
    assert Image.open(tmp_path / "first.png").tobytes() == Image.open(tmp_path / "second.png").tobytes()
    decompress_file(str(first), str(tmp_path / "first.bsq"), str(tmp_path / "own.png"))
    assert Image.open(tmp_path / "own.png").tobytes() != Image.open(tmp_path / "first.png").tobytes()
    with pytest.raises(ValueError, match="load the prior's model folder" if has_prior else "load its models"):
        decompress_file(save_tokenizer(tmp_path / "other", 1), str(tmp_path / "first.bsq"), str(tmp_path / "x.png"))


def _store_tokens_id(*urls):
    """Let priors accept every decoder of the tokens of their tokenizer; both have the id of the first one."""
    tokens_id = Tokenizer.from_pretrained(f"{urls[0]}/tokenizer").tokens_id
    for url in urls:
        prior = Prior.from_pretrained(str(url))
        run_config = config.PriorConfig(name="p", model=prior.config.model_copy(update={"tokens_id": tokens_id}))
        prior.save_pretrained(str(url), run_config)


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(100), Fraction(30000, 1001)])
def test_resolve_frame_at_start_time_returns_that_frame(rate):
    clip = VideoHeader(200, 1, rate, SRGB)
    exact_frames = [n for n in range(200) if (n / rate * 10_000).denominator == 1]
    assert len(exact_frames) >= 7
    assert [DecodeSelection(time_s=float(n / rate)).resolve_frame(clip) for n in exact_frames] == exact_frames
    with pytest.raises(ValueError, match="there is no frame -1"):
        DecodeSelection(time_s=-0.001).resolve_frame(clip)


def test_commands_work_with_pipes(model, photo, tmp_path):
    def run_command(*words, data):
        code = "from bsq_ray.cli.main import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *words, "--model", model], input=data, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with open(photo, "rb") as file:
        coded = run_command("compress", "-", "-", data=file.read())
    assert coded[:4] == b"BSQ1"
    assert Image.open(io.BytesIO(run_command("decompress", "-", "-", data=coded))).size == (90, 60)
    frames = [np.asarray(Image.open(photo))] * 3
    write_video(str(tmp_path / "a.mkv"), "matroska", iter(frames), Fraction(25), SRGB)
    coded = run_command("compress", "-", "-", data=(tmp_path / "a.mkv").read_bytes())
    clip = read_video(io.BytesIO(run_command("decompress", "-", "-", data=coded)))
    assert len(list(clip.frames)) == 3


def test_files_invalid_input_raises_clear_errors(model, photo, tmp_path):
    coded = str(tmp_path / "a.bsq")
    compress_file(model, photo, coded)
    with pytest.raises(ValueError, match=r"must end in .png or .webp \(an image"):
        decompress_file(model, coded, "x.jpg")
    with pytest.raises(ValueError, match="cannot be read as an image or video"):
        compress_file(model, coded, str(tmp_path / "b.bsq"))
    with pytest.raises(ValueError, match="--frame and --seek are for clips"):
        decompress_file(model, coded, str(tmp_path / "x.png"), DecodeSelection(frame=0))
    with pytest.raises(ValueError, match="OUT must end in .png or .webp"):
        decompress_file(model, coded, str(tmp_path / "x.mp4"))
    with pytest.raises(ValueError, match=r"photo.jpg: not a .bsq file"):
        decompress_file(model, photo, str(tmp_path / "x.png"))
    with pytest.raises(ValueError, match="claims 90 x 60 pixels; the limit is 1 to 100 pixels"):
        decompress_file(model, coded, str(tmp_path / "x.png"), DecodeSelection(max_pixels=100))
    with pytest.raises(ValueError, match="does not exist"):
        compress_file(model, str(tmp_path / "none.png"), coded)
