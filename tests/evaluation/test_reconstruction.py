"""Evaluation of a tokenizer with any number of workers: metrics, provenance, baseline."""

import json
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_tokenizer

from bsq_ray import config
from bsq_ray.cli.info import format_info
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.transforms import to_uint8
from bsq_ray.evaluation.provenance import collect_provenance
from bsq_ray.evaluation.reconstruction.baseline import MeanColorCodec
from bsq_ray.evaluation.reconstruction.batch_metrics import flip_bits
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_file
from bsq_ray.models.tokenizer import Tokenizer, Tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained tokenizer of 36 bits at 32 px."""
    torch.manual_seed(0)
    small = config.DecoderConfig(width=32, layers=1, heads=2, head_hidden_dim=32)
    model_config = config.TokenizerModelConfig(
        image_size=32,
        encoder=config.TransformerConfig(width=32, layers=1, heads=2),
        decoder=small,
        quantizer=config.BSQConfig(bits=36),
    )
    url = str(tmp_path_factory.mktemp("model"))
    Tokenizer(model_config).save_pretrained(url)
    return url


@pytest.fixture(scope="module")
def results(model, held_out_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    return evaluate_reconstruction(model, held_out_shards, str(out), workers=0, batch_size=5), out


def test_evaluation_on_two_workers_equals_local(model, held_out_shards, results, tmp_path, ray_local):
    on_ray = evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=2, batch_size=4)
    for name, metrics in results[0]["rows"].items():
        for key, value in metrics.items():
            if key != "images_per_second":
                assert on_ray["rows"][name][key] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, key)
    assert on_ray["model_id"] == results[0]["model_id"]


def test_baseline_codec_beats_untrained_model(results):
    rows = results[0]["rows"]
    assert rows["mean color"]["psnr"] > rows["model"]["psnr"] + 3
    assert rows["mean color"]["lpips"] < rows["model"]["lpips"]
    assert rows["model"]["bits_per_pixel"] == 36 / 64
    assert 0 < rows["model"]["code_usage"] < 1
    assert len(results[0]["bit_entropies"]) == 36


def test_provenance_lists_missing_packages(held_out_shards, monkeypatch):
    def version(package):
        if package == "ray":
            raise metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    versions = collect_provenance(read_manifest(held_out_shards), 12, size=32, resize_filter="lanczos", networks=())[
        "versions"
    ]
    assert (versions["ray"], versions["torch"]) == ("not installed", "1")


def test_results_contain_provenance(results, held_out_shards):
    provenance = results[0]["provenance"]
    assert provenance["data"] == held_out_shards
    assert provenance["num_samples"] == 12
    assert "lanczos" in provenance["resize"]
    assert provenance["packing"] == "packed with a longer side of at most 192 px (lanczos, JPEG quality 95, or PNG)"
    assert "8 bits" in provenance["pixels"]
    assert provenance["weights"].keys() == {"lpips-alex", "lpips-vgg", "fid-inception"}
    assert all(len(weights["sha256"]) == 64 for weights in provenance["weights"].values())
    assert "biased" in provenance["warning"]
    assert "not defined for images of 32 px" in provenance["ms_ssim"]


def test_results_are_written_as_json_table_and_plot(results):
    written, out = results
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(written))
    table = (out / "results.md").read_text()
    assert table.startswith("| | bits/pixel | PSNR | SSIM | LPIPS (alex) |")
    assert "**" in table
    assert Image.open(out / "reconstructions.png").size == (7 * 198 + 6, 3 * 198 + 36)


def test_limit_and_published_rows_are_applied(model, held_out_shards, tmp_path):
    """The first samples alone can be evaluated, and published results follow the table."""
    evaluation = evaluate_reconstruction(
        model, held_out_shards, str(tmp_path), workers=0, limit=3, show_published=True, weights="raw"
    )
    assert evaluation["provenance"]["num_samples"] == 3
    assert (
        "| SDXL-VAE | ImageNet val 256 | lanczos | 64 | 25.38 | 0.7276 | 0.0666 | 0.72 |"
        in (tmp_path / "results.md").read_text()
    )


def test_invalid_model_or_data_raises(model, held_out_shards, tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        evaluate_reconstruction(held_out_shards, held_out_shards, str(tmp_path), workers=0)
    with pytest.raises(ValueError, match="is not a packed data set"):
        evaluate_reconstruction(model, model, str(tmp_path), workers=0)
    for few in (0, 1):
        with pytest.raises(ValueError, match="at least 2"):
            evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=0, limit=few)


@pytest.mark.parametrize(("bits", "levels"), [(18, [63, 63, 63]), (10, [7, 15, 7]), (2, [1, 1, 0]), (128, [65535] * 3)])
def test_baseline_codec_divides_bits_among_channels(bits, levels):
    codec = MeanColorCodec(8, bits)
    assert codec.levels.tolist() == levels
    ramp = torch.linspace(-1, 1, 8 * 4096).expand(1, 3, 8, -1)
    levels_C = codec.reconstruct(ramp)[0, :, 0, ::8]
    assert [min(len(channel.unique()), 512) for channel in levels_C] == [min(level + 1, 512) for level in levels]


def test_model_of_tiny_images_raises(held_out_shards, tmp_path):
    """A model of images that are too small for LPIPS is rejected before the measurement."""
    transformer = config.TransformerConfig(width=32, layers=1, heads=2)
    model_config = config.TokenizerModelConfig(
        image_size=16,
        encoder=transformer,
        decoder=config.DecoderConfig(width=32, layers=1, heads=2, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=4),
    )
    Tokenizer(model_config).save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="has images of 16 x 16 pixels; measuring needs 31 or more"):
        evaluate_reconstruction(str(tmp_path / "model"), held_out_shards, str(tmp_path / "out"), workers=0)


def nested_model(url, keep):
    """The tokenizer of `model` with 8 bits."""
    torch.manual_seed(0)
    model_config = config.TokenizerModelConfig(
        image_size=32,
        encoder=config.TransformerConfig(width=32, layers=1, heads=2),
        decoder=config.DecoderConfig(width=32, layers=1, heads=2, head_hidden_dim=32),
        quantizer=config.BSQConfig(bits=8, keep=keep),
    )
    Tokenizer(model_config).save_pretrained(str(url))
    return str(url)


def test_evaluation_of_fewer_bits_adds_rows(held_out_shards, tmp_path):
    """Nested bits and the baseline of cut bits have the metrics of an evaluation of the decoded prefixes."""
    nested, ordinary = nested_model(tmp_path / "nested", (4, 8)), nested_model(tmp_path / "ordinary", ())
    options = dict(workers=0, batch_size=6)
    rows = evaluate_reconstruction(nested, held_out_shards, str(tmp_path / "a"), bits=[2, 4], **options)["rows"]
    cut = evaluate_reconstruction(ordinary, held_out_shards, str(tmp_path / "b"), cut_bits=[4], **options)["rows"]
    assert list(rows) == ["model", "2 bits", "4 bits", "mean color"]
    assert [row["bits_per_pixel"] * 64 for row in rows.values()] == [8, 2, 4, 8]
    assert "| 4 bits |" in (tmp_path / "a" / "results.md").read_text()
    # Both have the same weights and differ in what they were trained for only.
    assert cut["cut to 4 bits"] == pytest.approx(rows["4 bits"])
    assert cut["model"]["psnr"] == pytest.approx(rows["model"]["psnr"])
    assert len({row["psnr"] for row in rows.values()}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [4]}, r"no nested bits \(model.quantizer.keep\); measure it with cut_bits \(--cut-bits\)"),
        ({"cut_bits": [36]}, "cannot measure 36 of 36 bits; use 1 to 35"),
        ({"cut_bits": [0]}, "cannot measure 0 of 36 bits"),
    ],
)
def test_evaluation_of_impossible_bits_raises(model, held_out_shards, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=0, **options)


def test_evaluation_of_flipped_bits_adds_rows(model, held_out_shards, results, tmp_path):
    """Each flip rate has a row with all metrics; they do not depend on batches, and other rows stay the same."""
    rates = {"flip_rates": [0.02, 0.4]}
    rows, others = (
        evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=0, batch_size=size, **rates)["rows"]
        for size in (5, 3)
    )
    assert list(rows) == ["model", "2 % of bits flipped", "40 % of bits flipped", "mean color"]
    for row in list(rows)[1:3]:
        assert {"psnr", "lpips", "kid", "rfid"} < rows[row].keys()
        assert rows[row] == pytest.approx(others[row], rel=1e-5, abs=1e-6)
    assert rows["model"]["psnr"] == results[0]["rows"]["model"]["psnr"]
    assert rows["model"]["bits_per_pixel"] == rows["40 % of bits flipped"]["bits_per_pixel"]


def test_flip_bits_has_the_rate_and_depends_on_keys():
    """At each rate that share of bits flips; the flips of a lower rate are among those of a higher one."""
    tokens = Tokens(torch.zeros(2, 256, 18, dtype=torch.bool), (1, 16, 16))
    low, high = (flip_bits(tokens, rate, ["a", "b"]).bits_BNL for rate in (0.05, 0.2))
    assert low.float().mean() == pytest.approx(0.05, abs=0.01)
    assert high.float().mean() == pytest.approx(0.2, abs=0.02)
    assert (low & high).equal(low)
    assert not torch.equal(high[0], high[1])
    assert torch.equal(flip_bits(Tokens(tokens.bits_BNL[:1], tokens.grid), 0.2, ["b"]).bits_BNL[0], high[1])


@pytest.mark.parametrize("rate", [0.0, 1.5, float("nan")])
def test_evaluation_of_impossible_flip_rate_raises(model, held_out_shards, tmp_path, rate):
    with pytest.raises(ValueError, match="is not a probability above 0"):
        evaluate_reconstruction(model, held_out_shards, str(tmp_path), workers=0, flip_rates=[rate])


def test_evaluation_of_flipped_bits_without_signs_raises(held_out_shards, tmp_path):
    """A flipped bit of finite scalar quantization may give a level that does not exist."""
    url = save_tokenizer(tmp_path / "model", 0, quantizer=config.FSQConfig(kind="fsq", levels=(5, 5)))
    with pytest.raises(ValueError, match="bits of the quantizer fsq are no signs"):
        evaluate_reconstruction(url, held_out_shards, str(tmp_path / "out"), workers=0, flip_rates=[0.1])


def test_baseline_codec_preserves_patch_means():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    patches = MeanColorCodec(8, 48).reconstruct(images)
    assert torch.allclose(patches[:, :, :8, :8].mean((2, 3)), images[:, :, :8, :8].mean((2, 3)), atol=1e-4)
    assert patches[0, 0, :8, :8].unique().numel() == 1


def test_reconstruct_file_of_any_size_keeps_size(photo_folders, tmp_path):
    """A model for any size reconstructs the whole photo, here of sides that are no multiples of a patch."""
    local = {"position": "rotary", "attention_radius": 3, "position_period": 4}
    model = save_tokenizer(tmp_path / "model", 0, **local)
    source = photo_folders[1] / "coffee.png"
    photo = Image.open(source).convert("RGB").resize((299, 203))
    photo.save(tmp_path / "photo.png")
    summary = reconstruct_file(model, str(tmp_path / "photo.png"), tmp_path / "out.png")
    side_by_side = Image.open(tmp_path / "out.png")
    assert side_by_side.size == (2 * 299, 203)
    assert side_by_side.crop((0, 0, 299, 203)).tobytes() == photo.tobytes()
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole_patches = torch.nn.functional.pad(pixels, (0, 5, 0, 5), mode="replicate")
    decoded = to_uint8(Tokenizer.from_pretrained(model).reconstruct(whole_patches))[0, :, :203, :299]
    assert np.abs(np.asarray(side_by_side.crop((299, 0, 598, 203))) - decoded.permute(1, 2, 0).int().numpy()).max() <= 1
    # 38 x 26 tokens of 10 bits.
    assert f"299 x 203 px in {38 * 26 * 10} bits ({38 * 26 * 10 / (299 * 203):g} bits per pixel), PSNR" in summary


def test_reconstruct_file_writes_side_by_side_image(model, photo_folders, tmp_path):
    summary = reconstruct_file(model, str(photo_folders[1] / "coffee.png"), tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (64, 32)
    assert "576 bits (0.5625 bits per pixel), PSNR" in summary
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="text.jpg cannot be read as an image"):
        reconstruct_file(model, str(tmp_path / "text.jpg"), tmp_path / "out.png")


def test_format_info_describes_folders_and_presets(model, held_out_shards, tmp_path):
    assert "16 tokens of 36 bits (bsq)" in format_info(model)
    assert "12 images" in format_info(held_out_shards)
    assert "1024 tokens of 18 bits" in format_info("imagenet256-bsq18")
    with pytest.raises(ValueError, match="is not a model folder, a run folder"):
        format_info(str(tmp_path))
