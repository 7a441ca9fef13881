"""Measuring a video tokenizer: frame by frame and as clips, the same for any number of workers."""

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
from bsq_ray.evaluation.plots.comparison_grid import Comparison, keep
from bsq_ray.evaluation.plots.frame_strips import animate, draw_strips
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance
from bsq_ray.metrics.i3d import I3D
from bsq_ray.models.tokenizer import Tokenizer

_FRAMES = 9


def saved_model(url, frames, **data):
    torch.manual_seed(0)
    section = config.TokenizerModel(
        image_size=32,
        frames=frames,
        encoder=config.Transformer(width=32, layers=1, heads=2),
        decoder=config.Decoder(width=32, layers=1, heads=2, head_hidden_dim=32),
    )
    run = config.TokenizerConfig(name="clips", model=section, data=config.Data(**data))
    Tokenizer(section).save_pretrained(url, run)
    return url


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained tokenizer of clips of 9 frames at 32 px."""
    return saved_model(str(tmp_path_factory.mktemp("model")), _FRAMES, clips_per_video=2, frame_stride=2)


@pytest.fixture(scope="module")
def results(model, held_out_video_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return evaluate_reconstruction(model, held_out_video_shards, str(out), workers=0, published_rows=True), out


def test_two_ray_workers_measure_what_one_process_does(model, held_out_video_shards, results, tmp_path, ray_local):
    there = evaluate_reconstruction(model, held_out_video_shards, str(tmp_path), workers=2, batch_size=1)
    for name, figures in results[0]["rows"].items():
        for key, value in figures.items():
            if key != "frames_per_second":
                assert there["rows"][name][key] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, key)
    assert there["by_frame"]["model"]["psnr"] == pytest.approx(results[0]["by_frame"]["model"]["psnr"])


def test_figures_are_those_of_the_clips_that_the_model_gives_back(model, held_out_video_shards, results):
    tokenizer = Tokenizer.from_pretrained(model)
    run = config.load_config(f"{model}/config.yaml")
    clips = build_pixel_source(run, read_manifest(held_out_video_shards)).read_eval(range(4)).values_P
    made = to_uint8(tokenizer.reconstruct(to_float(torch.from_numpy(clips)))).numpy()
    error = (clips.astype(float) - made) ** 2
    row = results[0]["rows"]["model"]
    psnr = 10 * np.log10(255**2 / error.mean((1, 3, 4)))
    assert row["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    assert results[0]["by_frame"]["model"]["psnr"] == pytest.approx(psnr.mean(0).tolist(), rel=1e-5)
    assert row["psnr_clip"] == pytest.approx((10 * np.log10(255**2 / error.mean((1, 2, 3, 4)))).mean(), rel=1e-5)
    signed = made.astype(float) - clips
    assert row["flicker"] == pytest.approx(np.abs(np.diff(signed, axis=2)).mean(), rel=1e-4)
    network, statistics = I3D(), [FeatureStatistics(400) for _ in range(2)]
    for each, pixels in zip(statistics, (clips, made), strict=True):
        each.update(network(to_float(torch.from_numpy(pixels))).numpy(), list("abcd"))
    assert row["rfvd"] == pytest.approx(frechet_distance(*statistics), rel=1e-3)


def test_the_trivial_codec_is_better_than_an_untrained_model(results):
    rows = results[0]["rows"]
    assert rows["mean colour"]["psnr"] > rows["model"]["psnr"] + 3
    assert rows["mean colour"]["rfvd"] < rows["model"]["rfvd"]
    assert rows["model"]["bits_per_pixel"] == 18 / 64


def test_results_carry_their_contract_and_published_figures_of_videos(results, held_out_video_shards):
    written, out = results
    terms = written["contract"]
    assert (terms["kind"], terms["images"]) == ("videos", 4)
    assert terms["clips"].startswith("9 frames, every 2nd one of the video; at most 2 of a video")
    assert terms["weights"].keys() == {"lpips-alex", "lpips-vgg", "fvd-i3d"}
    assert "rFVD of 4 clips is biased" in terms["warning"]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(written))
    table = (out / "results.md").read_text()
    assert "| PSNR | PSNR (whole clips) |" in table
    assert "4 clips of" in table
    assert "| BSQ-ViT, block-causal | test | 36 | 33.55 | 0.9588 | 0.0167 | 6.21 |" in table


def test_pictures_are_a_strip_and_an_animation(results):
    _, out = results
    assert Image.open(out / "reconstructions.png").size == (110 + 8 * 132, 3 * (24 + 3 * 132 + 4))
    animation = Image.open(out / "reconstructions.webp")
    frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == _FRAMES
    assert animation.info["loop"] == 0
    assert np.abs(frames[0] - frames[-1]).mean() > 0.5


def test_clips_that_are_too_short_for_the_network_have_no_fvd_and_the_contract_says_so(held_out_video_shards, tmp_path):
    model = saved_model(str(tmp_path / "model"), 4)
    found = evaluate_reconstruction(model, held_out_video_shards, str(tmp_path / "out"), workers=0)
    assert "rfvd" not in found["rows"]["model"]
    assert "not defined for clips of 4 frames" in found["contract"]["rfvd"]


def test_a_video_tokenizer_measures_images_as_clips_of_one_frame(model, held_out_shards, tmp_path):
    found = evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=0, limit=3)
    assert found["contract"]["kind"] == "images"
    assert "rfid" in found["rows"]["model"]
    assert "by_frame" not in found


def test_what_does_not_fit_is_said(model, held_out_video_shards, tmp_path):
    images = saved_model(str(tmp_path / "images"), 1)
    with pytest.raises(ValueError, match="holds videos, but clips takes images"):
        evaluate_reconstruction(images, held_out_video_shards, str(tmp_path), workers=0)
    long = saved_model(str(tmp_path / "long"), 300)
    with pytest.raises(ValueError, match="no video of .* has the 300 frames of a clip"):
        evaluate_reconstruction(long, held_out_video_shards, str(tmp_path), workers=0)
    with pytest.raises(ValueError, match="has 1 clips; measuring needs at least 2"):
        evaluate_reconstruction(model, held_out_video_shards, str(tmp_path), workers=0, limit=1)


def test_few_large_clips_are_kept_and_drawn():
    big = np.zeros((3, 3, 40, 256, 256), np.uint8)
    clips = [Comparison(str(n), big, [n / 40, 0.0], [20.0, 20.0]) for n in range(40)]
    kept = keep(clips)
    assert {"0", "39"} <= {clip.key for clip in kept}
    assert len(kept) * big.nbytes < 600 * 2**20
    shown = draw_strips(kept[:1], [0.0])
    assert Image.open(io.BytesIO(shown)).width == 110 + 8 * 132
    assert Image.open(io.BytesIO(animate(kept[:2], [0.0, 0.1], 25))).n_frames > 0
