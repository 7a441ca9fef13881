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
from bsq_ray.cli.main import main
from bsq_ray.codec.rate import Rate
from bsq_ray.data.transforms import to_float
from bsq_ray.evaluation.compression import evaluate_compression as compression
from bsq_ray.evaluation.compression.compression_report import compression_markdown
from bsq_ray.evaluation.compression.evaluate_compression import PRIOR, RAW, evaluate_compression
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.evaluation.compression.rate_distortion import interpolate_at_rate
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.metrics.border_steps import border_step_ratio
from bsq_ray.metrics.dists import dists, load_network
from bsq_ray.metrics.lpips import lpips
from bsq_ray.models import pretrained_weights
from bsq_ray.models.pretrained_weights import resolve_once

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
    assert evaluation["bd_rates"].keys() == {"psnr", "ms_ssim", "lpips", "dists"}
    assert all(rates.keys() == {"WebP"} for rates in evaluation["bd_rates"].values())
    assert evaluation["bd_rates"]["psnr"]["WebP"]["percent"] < 0
    table = (out / "results.md").read_text()
    assert f"| {PRIOR} |" in table
    assert "| at our rate | bits/pixel | PSNR | MS-SSIM | LPIPS | DISTS | encode s | decode s |" in table
    assert "| BD-rate against JPEG | PSNR | MS-SSIM | LPIPS | DISTS |" in table
    assert "Kodak (2 of 24)" in table
    assert "Warning: 2 of 2 images do not have the 768 pixels of Kodak" in table
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
    assert jpeg["metrics"]["dists"] == pytest.approx(dists(*pair).item(), abs=1e-5)
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
    evaluation = evaluate_compression(
        tokenizer, str(folder), str(tmp_path), workers=0, max_side=190, metrics=["lpips", "ms_ssim"]
    )
    assert evaluation["curves"].keys() == {RAW, "JPEG"}
    assert evaluation["metrics"] == ("psnr", "ms_ssim", "lpips"), "PSNR is always measured"
    assert "dists" not in evaluation["curves"][RAW][0]
    assert "DISTS" not in (tmp_path / "results.md").read_text()
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
        str(tmp_path / "model"),
        str(tmp_path / "set"),
        str(out),
        workers=0,
        max_frames=3,
        max_side=320,
        metrics=("ms_ssim", "lpips"),
    )
    assert (evaluation["dataset"], evaluation["kind"], evaluation["anchor"]) == ("UVG (1 of 7)", "clips", "H.264")
    assert evaluation["curves"].keys() == {RAW, PRIOR, "H.264", "HEVC", "AV1"}
    # Raw bits: 10 a token of 8 x 8 pixels; tiles of 32 pixels fill up 320 x 180, and groups of 2 frames fill up 3.
    tokens = 10 / 64 * 192 / 180 * 4 / 3
    assert tokens < evaluation["curves"][RAW][0]["bits_per_pixel"] < 1.1 * tokens
    assert "at most 3 frames each" in (out / "results.md").read_text()


NESTED = config.BSQConfig(bits=10, keep=(2, 4, 8, 10))


@pytest.fixture(scope="module")
def nested_model(tmp_path_factory):
    """Model folder of an untrained prior of planes, with a tokenizer of nested bits."""
    url = tmp_path_factory.mktemp("nested")
    torch.manual_seed(0)
    Prior(MODEL_CONFIG.model_copy(update={"order": "plane", "sub_bits": 2})).save_pretrained(str(url))
    save_tokenizer(url / "tokenizer", 0, quantizer=NESTED)
    return str(url)


@pytest.fixture
def small_set(photos, tmp_path, monkeypatch):
    """One small photo, and JPEG as the only standard codec."""
    jpeg = {"JPEG": replace(standard_codecs()["JPEG"], qualities=(5, 35, 70))}
    monkeypatch.setattr(compression, "standard_codecs", lambda: jpeg)
    (tmp_path / "set").mkdir()
    photos[0].resize((64, 48)).save(tmp_path / "set" / "a.png")
    return str(tmp_path / "set")


def test_nested_bits_give_a_point_at_each_number_of_bits(nested_model, small_set, tmp_path):
    """One command measures the whole curve, with the sizes and pixels of files of fewer bits."""
    evaluation = evaluate_compression(nested_model, small_set, str(tmp_path), workers=0)
    codec, photo = Codec.from_pretrained(nested_model), Image.open(f"{small_set}/a.png")
    for name in (RAW, PRIOR):
        assert [row["quality"] for row in evaluation["curves"][name]] == [2, 4, 8, 10]
    for row in evaluation["curves"][PRIOR]:
        data = codec.compress(photo, rate=Rate(bits=int(row["quality"]))).data
        assert row["bits_per_pixel"] == 8 * len(data) / (64 * 48)
        error = np.asarray(codec.decompress(data)).astype(float) - np.asarray(photo)
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / (error**2).mean()), abs=1e-3)
    assert list(evaluation["at_bits"]) == ["2", "4", "8", "10"]
    assert evaluation["at_bits"]["10"] == evaluation["at_our_rate"]
    assert evaluation["at_bits"]["4"][PRIOR] == evaluation["curves"][PRIOR][1]
    assert evaluation["at_bits"]["4"][RAW] == evaluation["curves"][RAW][1]
    table = (tmp_path / "results.md").read_text()
    assert all(f"| at {bits} bits per token | bits/pixel |" in table for bits in (2, 4, 8, 10))


def test_table_names_bd_rates_without_common_quality(results):
    """The BD-rate table distinguishes no overlap, an overlap of some images, and codecs without a curve."""
    rates = {"AVIF": {"percent": None, "num_items": 0}, "WebP": {"percent": -12.34, "num_items": 1}}
    table = compression_markdown(results[0] | {"bd_rates": {"psnr": rates, "dists": {"WebP": rates["WebP"]}}})
    assert "| BD-rate against JPEG | PSNR | DISTS |" in table
    assert "| AVIF | no overlap | – |" in table
    assert "| WebP | -12.3 % (1 of 2) | -12.3 % (1 of 2) |" in table
    assert "| JPEG XL | no overlap" not in table


def test_bits_select_the_points_of_nested_bits(nested_model, small_set, tmp_path):
    evaluation = evaluate_compression(nested_model, small_set, str(tmp_path), workers=0, bits=(6, 4), metrics=())
    for name in (RAW, PRIOR):
        assert [row["quality"] for row in evaluation["curves"][name]] == [4, 6]
    saved = 1 - evaluation["curves"][PRIOR][1]["bits_per_pixel"] / evaluation["curves"][RAW][1]["bits_per_pixel"]
    assert evaluation["prior_savings"] == saved, "with the most bits"


def test_prior_in_token_order_has_one_point(nested_model, small_set, tmp_path):
    """A prior of whole tokens codes all bits: raw bits have a curve, and the prior a point."""
    shutil.copytree(f"{nested_model}/tokenizer", tmp_path / "prior" / "tokenizer")
    Prior(MODEL_CONFIG).save_pretrained(str(tmp_path / "prior"))
    evaluation = evaluate_compression(str(tmp_path / "prior"), small_set, str(tmp_path), workers=0, metrics=())
    assert [row["quality"] for row in evaluation["curves"][RAW]] == [2, 4, 8, 10]
    assert len(evaluation["curves"][PRIOR]) == 1
    assert evaluation["at_our_rate"][RAW]["quality"] == 10
    assert evaluation["at_bits"] == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (3,)}, "tokens cannot be cut to 3 bits; use 2 to 10 in steps of 2"),
        ({"bits": (12,)}, "tokens cannot be cut to 12 bits; use 1 to 10"),
        ({"metrics": ("psnr", "vmaf")}, "unknown metric 'vmaf'; use psnr, ms_ssim, lpips, dists"),
    ],
)
def test_invalid_bits_and_metrics_raise(nested_model, small_set, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_compression(nested_model, small_set, str(tmp_path), workers=0, **options)


def test_command_passes_bits_and_metrics(nested_model, small_set, tmp_path, capsys):
    """The command prints the tables; an invalid option is one line without a traceback."""
    command = ["evaluate", "compression", "--model", nested_model, "--data", small_set, "--workers", "0"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--out", str(tmp_path / "out"), "--bits", "4,6", "--metrics", "psnr, lpips"])
    assert not exit_.value.code
    printed = capsys.readouterr().out
    assert "| at 4 bits per token | bits/pixel | PSNR | LPIPS | encode s | decode s |" in printed
    assert "| at 6 bits per token |" in printed
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--out", str(tmp_path / "out"), "--metrics", "psnr,vmaf"])
    assert exit_.value.code == 2
    assert "unknown metric 'vmaf'" in capsys.readouterr().err.strip().splitlines()[-1]


def test_bits_of_a_tokenizer_without_nested_bits_raise(model, small_set, tmp_path):
    with pytest.raises(ValueError, match=r"--bits needs a tokenizer trained with nested bits"):
        evaluate_compression(model, small_set, str(tmp_path), workers=0, bits=(5,))


def test_missing_weights_of_dists_raise_before_compression(model, small_set, tmp_path, monkeypatch):
    """The message names the package; without DISTS the evaluation works."""
    load_network.cache_clear()
    resolve_once.cache_clear()
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "cache"))
    find_spec = pretrained_weights.find_spec
    monkeypatch.setattr(pretrained_weights, "find_spec", lambda name: None if "DISTS" in name else find_spec(name))
    with pytest.raises(ValueError, match="pip install --no-deps DISTS-pytorch==0.1"):
        evaluate_compression(model, small_set, str(tmp_path), workers=0)
    evaluate_compression(model, small_set, str(tmp_path), workers=0, metrics=("psnr",))


# Sizes of images, and the metrics that are not defined for some of them.
SMALL_IMAGES = {
    "one below 161": ([(192, 176), (100, 300)], {"ms_ssim": ["1.png"]}),
    "all below 161": ([(160, 300), (40, 31)], {"ms_ssim": ["0.png", "1.png"]}),
    "one below 31": ([(192, 176), (30, 200)], {"ms_ssim": ["1.png"], "lpips": ["1.png"]}),
    "icons": (
        [(16, 16), (24, 30)],
        {"ms_ssim": ["0.png", "1.png"], "lpips": ["0.png", "1.png"], "dists": ["0.png"]},
    ),
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
    for metric, name in (("ms_ssim", "MS-SSIM"), ("lpips", "LPIPS"), ("dists", "DISTS")):
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
