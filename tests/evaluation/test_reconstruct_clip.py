"""`bsq-ray reconstruct` of a video: all frames, side by side with the original, in constant memory."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from real_clips import clip_path, street_clip
from small_models import save_any_size
from small_videos import video_of_two_sizes

from bsq_ray import Tokenizer, config
from bsq_ray.data.transforms import to_uint8
from bsq_ray.evaluation.reconstruction import reconstruct_file as reconstruct_module
from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_clip, reconstruct_file


@pytest.fixture(scope="module", params=["causal", "full attention", "images"])
def model(request, tmp_path_factory):
    """URL of an untrained model of four frames, or of images."""
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "heads": 2}
    section = config.TokenizerModelConfig(
        image_size=32,
        frames=1 if request.param == "images" else 4,
        causal=request.param == "causal",
        encoder=config.TransformerConfig(**sizes),
        decoder=config.DecoderConfig(**sizes, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=10),
    )
    url = str(tmp_path_factory.mktemp("model") / "model")
    Tokenizer(section).save_pretrained(url)
    return url


def write_lossless(path, frames):
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")))
        output.mux(stream.encode(None))
    return str(path)


@pytest.fixture
def short_clip(tmp_path):
    """Path of a lossless video of ten frames of the street, and the frames, uint8 (10, 32, 32, 3)."""
    frames = to_uint8(street_clip(10, 32))[0].permute(1, 2, 3, 0).numpy()
    return write_lossless(tmp_path / "street.mkv", frames), frames


@pytest.fixture
def street(tmp_path):
    """Function that returns the path of a lossless video of six frames of another width and height, and the frames."""

    def write(width, height):
        frames = to_uint8(street_clip(6, 80))[0].permute(1, 2, 3, 0)[:, :height, :width].numpy()
        return write_lossless(tmp_path / "street.mkv", frames), frames

    return write


def read_video_frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_reconstruct_clip_writes_originals_on_the_left(model, short_clip, tmp_path):
    """Each frame shows the original on the left and the reconstruction on the right."""
    path, frames = short_clip
    progress = []
    summary = reconstruct_clip(
        model, path, tmp_path / "out.mp4", on_progress=lambda now, total: progress.append((now, total))
    )
    side_by_side = read_video_frames(tmp_path / "out.mp4").astype(int)
    assert side_by_side.shape == (10, 32, 64, 3)
    # H.264 with 4:2:0 chroma subsampling changes the pixels little.
    assert np.abs(side_by_side[:, :, :32] - frames).mean() < 6
    tokenizer = Tokenizer.from_pretrained(model)
    together = tokenizer.config.frames
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    first = to_uint8(tokenizer.reconstruct(clip[:, :, :together]))[0].permute(1, 2, 3, 0).numpy().astype(int)
    assert np.abs(side_by_side[:together, :, 32:] - first).mean() < 6
    assert f"10 frames of 32 x 32 px in 160 bits each ({160 / 1024:g} bits per pixel), PSNR" in summary
    assert [now for now, _ in progress] == list(range(1, 11))
    assert all(total >= now for now, total in progress)


@pytest.mark.parametrize("frames", [1, 4])
def test_reconstruct_clip_with_local_attention_keeps_the_size(frames, street, tmp_path, monkeypatch):
    """Frames are not cropped; each group of frames is that of one pass."""
    url = save_any_size(tmp_path / "model", frames)
    path, originals = street(76, 44)
    written = []

    def write(path, container_format, frames, *_):
        written.extend(frames)
        Path(path).touch()

    # Before H.264 changes them.
    monkeypatch.setattr(reconstruct_module, "write_video", write)
    summary = reconstruct_clip(url, path, tmp_path / "out.mp4")
    side_by_side = np.stack(written).astype(int)
    assert side_by_side.shape == (6, 44, 152, 3)
    assert np.array_equal(side_by_side[:, :, :76], originals)
    clip = torch.from_numpy(originals).permute(3, 0, 1, 2).float()
    whole_patches = torch.nn.functional.pad(clip, (0, 4, 0, 4), mode="replicate")[None] / 127.5 - 1
    tokenizer = Tokenizer.from_pretrained(url)
    expected = torch.cat([tokenizer.reconstruct(part) for part in whole_patches.split(frames, 2)], 2)
    expected = to_uint8(expected)[0, :, :, :44, :76].permute(1, 2, 3, 0).numpy().astype(int)
    alone = tokenizer.reconstruct(whole_patches[:, :, 3])
    alone = to_uint8(alone)[0, :, :44, :76].permute(1, 2, 0).numpy().astype(int)
    assert (np.abs(alone - expected[3]).max() > 10) == (frames > 1), "frames depend on earlier ones"
    # Halves may be rounded to either level.
    assert np.abs(side_by_side[:, :, 76:] - expected).max() <= 1
    assert f"6 frames of 76 x 44 px in 600 bits each ({600 / (76 * 44):g} bits per pixel), PSNR" in summary


@pytest.mark.parametrize("frames", [1, 3])
def test_reconstruct_clip_whose_frames_change_size_raises(frames, tmp_path):
    (tmp_path / "clip.mkv").write_bytes(video_of_two_sizes())
    url = save_any_size(tmp_path / "model", frames)
    with pytest.raises(ValueError, match=r"frame 2 of the video has 96 x 80 pixels and frame 0 64 x 48"):
        reconstruct_clip(url, str(tmp_path / "clip.mkv"), tmp_path / "out.mp4")


@pytest.mark.parametrize(("frames", "causal"), [(1, True), (3, True), (3, False)])
def test_reconstruct_image_with_local_attention_keeps_the_size(frames, causal, photos, tmp_path):
    """An image is a clip of one frame, also for a model that sees all frames."""
    photos[0].resize((76, 44)).save(tmp_path / "photo.png")
    url = save_any_size(tmp_path / "model", frames, causal)
    summary = reconstruct_file(url, str(tmp_path / "photo.png"), tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (152, 44)
    assert "76 x 44 px in 600 bits" in summary


def test_reconstruct_clip_invalid_file_raises(model, tmp_path):
    (tmp_path / "text.mp4").write_text("no clip")
    with pytest.raises(ValueError, match=r"text.mp4 cannot be read as a clip: not a video of a known format"):
        reconstruct_clip(model, str(tmp_path / "text.mp4"), tmp_path / "out.mp4")
    with pytest.raises(ValueError, match="nowhere.mp4: it does not exist"):
        reconstruct_clip(model, str(tmp_path / "nowhere.mp4"), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


_MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_clip
peaks = []
def on_progress(done, total):
    if done in (60, total):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
reconstruct_clip(sys.argv[1], sys.argv[2], Path(sys.argv[3]), on_progress=on_progress)
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["causal"], indirect=True)
@pytest.mark.long
def test_reconstruct_clip_memory_is_constant(model, tmp_path):
    """Peak memory at the end of a real clip of one minute is close to that near its beginning."""
    out = tmp_path / "out.mp4"
    command = [sys.executable, "-c", _MEMORY_SCRIPT, model, str(clip_path("demo.3gp")), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    early, *_, end = map(float, done.stdout.split())
    assert len(read_video_frames(out)) == 1441
    # One copy of all frames would be 4 MB at this size, their fp32 forms 17 MB, their keys and values 24 MB.
    assert end < early + 12
