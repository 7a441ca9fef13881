"""Comparison of our codec with standard codecs: measurements, output files, invalid input."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from small_models import save_tokenizer

from bsq_ray import Codec, Prior, config
from bsq_ray.data.transforms import to_float
from bsq_ray.evaluation.compression import evaluate_compression as compression
from bsq_ray.evaluation.compression.evaluate_compression import PRIOR, RAW, evaluate_compression
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.evaluation.compression.rate_distortion import interpolate_at_rate
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.metrics.border_steps import border_step_ratio
from bsq_ray.metrics.lpips import lpips

MODEL_CONFIG = config.PriorModelConfig(grid=(1, 4, 4), bits=10, sub_bits=5, width=32, layers=1, heads=2, dropout=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Model folder of an untrained prior, with its tokenizer."""
    url = tmp_path_factory.mktemp("prior")
    torch.manual_seed(0)
    Prior(MODEL_CONFIG).save_pretrained(str(url))
    save_tokenizer(url / "tokenizer", 0)
    return str(url)


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    url = tmp_path_factory.mktemp("images")
    photos[0].resize((192, 176)).save(url / "kodim05.png")
    photos[1].resize((176, 200)).save(url / "kodim23.png")
    return url


@pytest.fixture(scope="module")
def results(model, folder, tmp_path_factory):
    """Results with a subset of the qualities; test_codecs.py uses all of them."""
    out = tmp_path_factory.mktemp("results")
    counts = {"JPEG": 4, "WebP": 4}
    few = {
        name: replace(codec, qualities=codec.qualities[1 : 1 + counts.get(name, 1)])
        for name, codec in standard_codecs().items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "standard_codecs", lambda: few)
        return evaluate_compression(model, str(folder), str(out), workers=0), out


def test_evaluation_writes_results_table_and_plots(results):
    evaluation, out = results
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(evaluation))
    assert evaluation["dataset"] == "Kodak (2 of 24)"
    assert (evaluation["num_items"], evaluation["kind"], evaluation["anchor"]) == (2, "images", "JPEG")
    assert evaluation["curves"].keys() == {RAW, PRIOR, "JPEG", "JPEG 2000", "WebP", "AVIF", "JPEG XL"}
    assert evaluation["bd_rate"].keys() == {"WebP"}
    table = (out / "results.md").read_text()
    assert f"| {PRIOR} |" in table
    assert "Kodak (2 of 24)" in table
    assert Image.open(out / "curves.png").width > 1000
    assert Image.open(out / "comparison.png").width == 2 * 262 + 6


def test_points_match_file_sizes_and_decoded_images(results, model, folder):
    """Rates are those of the written files, and metrics are those of the decoded images."""
    points = results[0]["per_item"]["kodim05.png"]
    photo = Image.open(folder / "kodim05.png")
    ours = next(point for point in points if point["codec"] == PRIOR)
    data = Codec.from_pretrained(model).compress(photo).data
    assert ours["bits_per_pixel"] == 8 * len(data) / (192 * 176)
    jpeg = next(point for point in points if point["codec"] == "JPEG" and point["quality"] == 20)
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=20, optimize=True)
    assert jpeg["bits_per_pixel"] == 8 * len(file.getvalue()) / (192 * 176)
    first, second = np.asarray(photo).astype(float), np.asarray(Image.open(file)).astype(float)
    assert jpeg["metrics"]["psnr"] == pytest.approx(10 * np.log10(255**2 / ((first - second) ** 2).mean()), abs=1e-3)
    pair = [to_float(torch.from_numpy(each.astype(np.uint8)).permute(2, 0, 1)[None]) for each in (first, second)]
    assert jpeg["metrics"]["lpips"] == pytest.approx(lpips(*pair).item(), abs=1e-5)
    assert jpeg["encode_seconds"] > 0 < jpeg["decode_seconds"]


def test_border_step_ratio_is_mean_over_images(results, model, folder):
    """Tiles of 32 px and patches of 8 px, in the original and in the decoded image."""
    evaluation, out = results
    codec, ratios = Codec.from_pretrained(model), []
    for path in sorted(folder.iterdir()):
        photo = Image.open(path)
        decoded = codec.decompress(codec.compress(photo).data)
        ratios.append([border_step_ratio(np.asarray(image), 32, 8) for image in (photo, decoded)])
    original, decoded = np.mean(ratios, 0)
    assert evaluation["border_step_ratio"] == pytest.approx({"original": original, "decoded": decoded})
    assert f"{decoded:.3f} (originals {original:.3f})" in (out / "results.md").read_text()


def test_content_reader_returns_pixels_without_color_profile(photos, tmp_path):
    """No codec converts colors: our codec would convert to sRGB and would be compared with unconverted pixels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photos[0].resize((64, 48)).save(tmp_path / "a.png", icc_profile=profile)
    image = compression._ContentReader("images", None, None)(str(tmp_path / "a.png"))
    assert "icc_profile" not in image.info
    assert image.tobytes() == Image.open(tmp_path / "a.png").convert("RGB").tobytes()


def test_prior_savings_match_file_sizes(results):
    curves = results[0]["curves"]
    assert curves[RAW][0]["psnr"] == curves[PRIOR][0]["psnr"], "the same tokens decode to the same image"
    saved = 1 - curves[PRIOR][0]["bits_per_pixel"] / curves[RAW][0]["bits_per_pixel"]
    assert results[0]["prior_savings"] == pytest.approx(saved)


def test_table_shows_codecs_at_our_rate_or_out_of_range(results):
    """Each standard codec is interpolated at our rate, or listed as not within its range."""
    evaluation, out = results
    rate = evaluation["curves"][PRIOR][0]["bits_per_pixel"]
    assert evaluation["at_our_rate"] == {
        codec: interpolate_at_rate(rows, rate) for codec, rows in evaluation["curves"].items()
    }
    table = (out / "results.md").read_text()
    for codec, row in evaluation["at_our_rate"].items():
        assert (f"| {codec} | not within its range |" in table) == (row is None)


@pytest.mark.slow
def test_evaluation_on_two_workers_equals_local(results, model, folder, tmp_path, ray_local):
    on_ray = evaluate_compression(model, str(folder), str(tmp_path), workers=2)
    for name, points in results[0]["per_item"].items():
        same = {(point["codec"], point["quality"]): point for point in on_ray["per_item"][name]}
        for ours in points:
            theirs = same[ours["codec"], ours["quality"]]
            assert theirs["bits_per_pixel"] == ours["bits_per_pixel"]
            assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-3)


def test_tokenizer_without_prior_has_raw_bits_only(model, folder, tmp_path, monkeypatch):
    """A tokenizer without a prior is evaluated with raw bits only, here on downscaled images."""
    jpeg = {"JPEG": replace(standard_codecs()["JPEG"], qualities=(20,))}
    monkeypatch.setattr(compression, "standard_codecs", lambda: jpeg)
    tokenizer = f"{model}/tokenizer"
    evaluation = evaluate_compression(tokenizer, str(folder), str(tmp_path), workers=0, max_side=190)
    assert evaluation["curves"].keys() == {RAW, "JPEG"}
    assert evaluation["prior_savings"] is None
    assert "saves" not in (tmp_path / "results.md").read_text()


def test_clips_are_compared_with_video_codecs(video_folders, tmp_path, monkeypatch):
    """Three frames of a night street, with an untrained tokenizer of clips of two frames."""
    (tmp_path / "set").mkdir()
    shutil.copy(video_folders[1] / "cityCC0.mpg", tmp_path / "set" / "Beauty_1920x1080.mpg")
    torch.manual_seed(0)
    Prior(MODEL_CONFIG.model_copy(update={"grid": (2, 4, 4)})).save_pretrained(str(tmp_path / "model"))
    save_tokenizer(tmp_path / "model" / "tokenizer", 0, frames=2)
    few = {name: replace(codec, qualities=codec.qualities[:1]) for name, codec in standard_video_codecs().items()}
    monkeypatch.setattr(compression, "standard_video_codecs", lambda: few)
    out = tmp_path / "out"
    evaluation = evaluate_compression(
        str(tmp_path / "model"), str(tmp_path / "set"), str(out), workers=0, max_frames=3, max_side=320
    )
    assert (evaluation["dataset"], evaluation["kind"], evaluation["anchor"]) == ("UVG (1 of 7)", "clips", "H.264")
    assert evaluation["curves"].keys() == {RAW, PRIOR, "H.264", "HEVC", "AV1"}
    # Raw bits: 10 a token of 8 x 8 pixels; tiles of 32 pixels fill up 320 x 180, and groups of 2 frames fill up 3.
    tokens = 10 / 64 * 192 / 180 * 4 / 3
    assert tokens < evaluation["curves"][RAW][0]["bits_per_pixel"] < 1.1 * tokens
    assert "at most 3 frames each" in (out / "results.md").read_text()


# Sizes of images, and the metrics that are not defined for some of them.
SMALL_IMAGES = {
    "one below 161": ([(192, 176), (100, 300)], {"ms_ssim": ["1.png"]}),
    "all below 161": ([(160, 300), (40, 31)], {"ms_ssim": ["0.png", "1.png"]}),
    "one below 31": ([(192, 176), (30, 200)], {"ms_ssim": ["1.png"], "lpips": ["1.png"]}),
    "icons": ([(16, 16), (24, 30)], {"ms_ssim": ["0.png", "1.png"], "lpips": ["0.png", "1.png"]}),
}


@pytest.mark.parametrize(("sizes", "undefined"), SMALL_IMAGES.values(), ids=SMALL_IMAGES)
def test_metrics_without_a_value_for_small_images_are_named(model, photos, tmp_path, monkeypatch, sizes, undefined):
    """A small image does not end the evaluation: metrics that need larger images are means over the others."""
    jpeg = {"JPEG": replace(standard_codecs()["JPEG"], qualities=(20,))}
    monkeypatch.setattr(compression, "standard_codecs", lambda: jpeg)
    (tmp_path / "set").mkdir()
    for number, size in enumerate(sizes):
        photos[number].resize(size).save(tmp_path / "set" / f"{number}.png")
    evaluation = evaluate_compression(f"{model}/tokenizer", str(tmp_path / "set"), str(tmp_path), workers=0)
    assert evaluation["undefined"] == undefined
    table = (tmp_path / "results.md").read_text()
    for metric, name in (("ms_ssim", "MS-SSIM"), ("lpips", "LPIPS")):
        items = undefined.get(metric, [])
        assert (f"{name} is not defined for {len(items)} of the 2 images" in table) == bool(items)
        assert (metric in evaluation["curves"]["JPEG"][0]) == (len(items) < 2)


def test_unusable_images_raise_with_their_name(model, photos, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    (small / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^\S+small/a.png cannot be read as an image"):
        evaluate_compression(model, str(small), str(tmp_path), workers=0)
    with pytest.raises(ValueError, match="contains no images and no clips"):
        evaluate_compression(model, model, str(tmp_path), workers=0)
