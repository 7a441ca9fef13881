"""Evaluation of a video tokenizer, per frame and per clip, with any number of workers."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from bsq_ray import config
from bsq_ray.data.factory import build_pixel_source
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.transforms import to_float, to_uint8
from bsq_ray.evaluation.plots.comparison_grid import Comparison, subsample
from bsq_ray.evaluation.plots.frame_strips import render_animation, render_strips
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance
from bsq_ray.metrics.i3d import I3D
from bsq_ray.models.tokenizer import Tokenizer

_FRAMES = 9


def save_model(url, frames, **data):
    torch.manual_seed(0)
    model_config = config.TokenizerModelConfig(
        image_size=32,
        frames=frames,
        encoder=config.TransformerConfig(width=32, layers=1, heads=2),
        decoder=config.DecoderConfig(width=32, layers=1, heads=2, head_hidden_dim=32),
    )
    run = config.TokenizerConfig(name="clips", model=model_config, data=config.DataConfig(**data))
    Tokenizer(model_config).save_pretrained(url, run)
    return url


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained tokenizer of clips of 9 frames at 32 px."""
    return save_model(str(tmp_path_factory.mktemp("model")), _FRAMES, clips_per_video=2, frame_stride=2)


@pytest.fixture(scope="module")
def results(model, held_out_video_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return evaluate_reconstruction(model, held_out_video_shards, str(out), workers=0, show_published=True), out


def test_evaluation_on_two_workers_equals_local(model, held_out_video_shards, results, tmp_path, ray_local):
    on_ray = evaluate_reconstruction(model, held_out_video_shards, str(tmp_path), workers=2, batch_size=1)
    for name, metrics in results[0]["rows"].items():
        for key, value in metrics.items():
            if key != "frames_per_second":
                assert on_ray["rows"][name][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
    assert on_ray["per_frame"]["model"]["psnr"] == pytest.approx(results[0]["per_frame"]["model"]["psnr"])


def test_clip_metrics_match_direct_computation(model, held_out_video_shards, results):
    """PSNR, flicker and rFVD equal the values computed directly from the model's reconstructions."""
    tokenizer = Tokenizer.from_pretrained(model)
    run = config.load_config(f"{model}/config.yaml")
    clips = build_pixel_source(run, read_manifest(held_out_video_shards)).read_eval(range(4)).values_P
    reconstructions = to_uint8(tokenizer.reconstruct(to_float(torch.from_numpy(clips)))).numpy()
    error = (clips.astype(float) - reconstructions) ** 2
    row = results[0]["rows"]["model"]
    psnr = 10 * np.log10(255**2 / error.mean((1, 3, 4)))
    assert row["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    assert results[0]["per_frame"]["model"]["psnr"] == pytest.approx(psnr.mean(0).tolist(), rel=1e-5)
    assert row["psnr_clip"] == pytest.approx((10 * np.log10(255**2 / error.mean((1, 2, 3, 4)))).mean(), rel=1e-5)
    signed = reconstructions.astype(float) - clips
    assert row["flicker"] == pytest.approx(np.abs(np.diff(signed, axis=2)).mean(), rel=1e-4)
    network, statistics = I3D(), [FeatureStatistics(400) for _ in range(2)]
    for each, pixels in zip(statistics, (clips, reconstructions), strict=True):
        each.update(network(to_float(torch.from_numpy(pixels))).numpy(), list("abcd"))
    assert row["rfvd"] == pytest.approx(frechet_distance(*statistics), rel=1e-3)


def test_baseline_codec_beats_untrained_model(results):
    rows = results[0]["rows"]
    assert rows["mean color"]["psnr"] > rows["model"]["psnr"] + 3
    assert rows["mean color"]["rfvd"] < rows["model"]["rfvd"]
    assert rows["model"]["bits_per_pixel"] == 18 / 64


def test_results_contain_provenance_and_published_rows(results, held_out_video_shards):
    """The results contain the conditions of the measurement and the published video results."""
    written, out = results
    provenance = written["provenance"]
    assert (provenance["kind"], provenance["num_samples"]) == ("videos", 4)
    assert provenance["clips"].startswith("9 frames, every 2nd frame of the video; at most 2 clips per video")
    assert provenance["weights"].keys() == {"lpips-alex", "lpips-vgg", "fvd-i3d"}
    assert "rFVD of 4 clips is biased" in provenance["warning"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(written))
    table = (out / "results.md").read_text()
    assert "| PSNR | PSNR (whole clips) |" in table
    assert "4 clips of" in table
    assert "| BSQ-ViT, block-causal | test | 36 | 33.55 | 0.9588 | 0.0167 | 6.21 |" in table


def test_plots_are_frame_strips_and_animation(results):
    _, out = results
    assert Image.open(out / "reconstructions.png").size == (110 + 8 * 132, 3 * (24 + 3 * 132 + 4))
    animation = Image.open(out / "reconstructions.webp")
    frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == _FRAMES
    assert animation.info["loop"] == 0
    assert np.abs(frames[0] - frames[-1]).mean() > 0.5


def test_short_clips_have_no_rfvd(held_out_video_shards, tmp_path):
    """Clips that are too short for I3D have no rFVD, and the provenance states the reason."""
    model = save_model(str(tmp_path / "model"), 4)
    evaluation = evaluate_reconstruction(model, held_out_video_shards, str(tmp_path / "out"), workers=0)
    assert "rfvd" not in evaluation["rows"]["model"]
    assert "not defined for clips of 4 frames" in evaluation["provenance"]["rfvd"]


def test_video_tokenizer_evaluates_images_as_single_frames(model, held_out_shards, tmp_path):
    evaluation = evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=0, limit=3)
    assert evaluation["provenance"]["kind"] == "images"
    assert "rfid" in evaluation["rows"]["model"]
    assert "per_frame" not in evaluation


def test_mismatched_model_or_data_raises(model, held_out_video_shards, tmp_path):
    images = save_model(str(tmp_path / "images"), 1)
    with pytest.raises(ValueError, match="contains videos, but clips takes images"):
        evaluate_reconstruction(images, held_out_video_shards, str(tmp_path), workers=0)
    long = save_model(str(tmp_path / "long"), 300)
    with pytest.raises(ValueError, match="no video of .* has the 300 frames of a clip"):
        evaluate_reconstruction(long, held_out_video_shards, str(tmp_path), workers=0)
    with pytest.raises(ValueError, match="has 1 clips; an evaluation needs at least 2"):
        evaluate_reconstruction(model, held_out_video_shards, str(tmp_path), workers=0, limit=1)


def test_large_clips_are_subsampled_and_rendered():
    """Subsampling bounds the memory of large clips and keeps the best and the worst one."""
    big = np.zeros((3, 3, 40, 256, 256), np.uint8)
    clips = [Comparison(str(n), big, [n / 40, 0.0], [20.0, 20.0]) for n in range(40)]
    subset = subsample(clips)
    assert {"0", "39"} <= {clip.key for clip in subset}
    assert len(subset) * big.nbytes < 600 * 2**20
    png = render_strips(subset[:1], [0.0])
    assert Image.open(io.BytesIO(png)).width == 110 + 8 * 132
    assert Image.open(io.BytesIO(render_animation(subset[:2], [0.0, 0.1], 25))).n_frames > 0
