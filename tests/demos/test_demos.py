"""The demos from photos to results with tiny models: every step runs, and the summary contains the results."""

import json

import numpy as np
import pytest
from PIL import Image
from small_models import save_tokenizer

from bsq_ray.demos import compress_demo, generate_demo

pytestmark = pytest.mark.slow

SMALL_TOKENIZER = (
    "model.encoder.width=32",
    "model.encoder.layers=1",
    "model.decoder.width=32",
    "model.decoder.layers=1",
)
SMALL_TOKENIZER += ("training.eval_every=1000000", "loss.adversarial.weight=0")
SMALL_TOKENS = ("model.width=32", "model.layers=1", "training.eval_every=1000000")


@pytest.fixture(scope="module")
def labeled_folder(photo_folders, tmp_path_factory):
    """A folder of photos in two classes by brightness."""
    photos = [Image.open(path).convert("RGB").resize((96, 80)) for path in sorted(photo_folders[0].iterdir())]
    return split_by_brightness(photos, tmp_path_factory.mktemp("labeled"))


def split_by_brightness(photos, folder):
    photos = sorted(photos, key=lambda photo: np.asarray(photo).mean())
    for index, photo in enumerate(photos):
        class_folder = folder / ("dark" if index < len(photos) // 2 else "light")
        class_folder.mkdir(exist_ok=True)
        photo.save(class_folder / f"{index}.png")
    return folder


@pytest.mark.long
def test_compress_demo_compares_on_unseen_images(labeled_folder, photos, tmp_path, ray_local, monkeypatch):
    """The compression demo compares codecs on images that no model was trained on."""
    monkeypatch.setattr(compress_demo, "WORKERS", 0)
    images = tmp_path / "images"
    images.mkdir()
    photos[2].resize((192, 176)).save(images / "unseen.png")
    results = compress_demo.run_demo(images, tmp_path / "demo", 0.1, labeled_folder, SMALL_TOKENIZER, SMALL_TOKENS)
    assert results["num_items"] == 1
    assert results["prior_savings"] < 1
    assert json.loads((tmp_path / "demo" / "evaluation" / "results.json").read_text())["dataset"] == str(images)
    assert (tmp_path / "demo" / "evaluation" / "curves.png").exists()
    with pytest.raises(ValueError, match="two or more class folders"):
        compress_demo.run_demo(images, tmp_path / "other", 0.1, images)
    assert "dists" not in results["metrics"]


def test_compress_demo_compares_a_given_model(photos, tmp_path, ray_local, monkeypatch):
    """A trained model is compared without training, in all metrics; an unknown one is an error before any work."""
    monkeypatch.setattr(compress_demo, "WORKERS", 0)
    (tmp_path / "images").mkdir()
    photos[2].resize((192, 176)).save(tmp_path / "images" / "unseen.png")
    model = save_tokenizer(tmp_path / "tokenizer", 0)
    results = compress_demo.compare_model(model, tmp_path / "images", tmp_path / "demo")
    assert results["num_items"] == 1
    assert {"psnr", "lpips", "dists"} <= set(results["metrics"])
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["evaluation"]
    with pytest.raises(ValueError, match="does not exist|no shipped model"):
        compress_demo.compare_model("no-such-model", None, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_generate_demo_too_few_photos_raises(photos, tmp_path):
    """Too few photos raise an error before any training starts."""
    folder = split_by_brightness([photo.resize((96, 80)) for photo in photos], tmp_path)
    with pytest.raises(ValueError, match="has too few photos: .*, 2 in total"):
        generate_demo.run_demo(folder, tmp_path / "demo", 0.1)
    assert not (tmp_path / "demo" / "tokenizer").exists()


@pytest.mark.long
def test_generate_demo_compares_guidance_with_frequencies(labeled_folder, tmp_path, ray_local, monkeypatch):
    """The generation demo compares guidance scales with the frequency baseline."""
    monkeypatch.setattr(generate_demo, "_GUIDANCE_SCALES", (0.0, 2.0))
    # Evaluations in worker processes are tested elsewhere, and each starts its own.
    monkeypatch.setattr(generate_demo, "WORKERS", 0)
    result = generate_demo.run_demo(
        labeled_folder, tmp_path, 0.1, SMALL_TOKENIZER, (*SMALL_TOKENS, "sampling.steps=2"), num_images=8
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["guidance"]) == ["0", "2"]
    assert results["frequencies"].keys() == results["guidance"]["0"].keys()
    assert results["bits_per_token"] > 0 < results["bits_per_token_of_frequencies"]
    assert result.sheet.exists()
    assert all(f"\n{name} " in result.summary for name in ("0", "2", "frequencies"))
    assert f"{results['guidance']['2']['kid']:.4f}" in result.summary
