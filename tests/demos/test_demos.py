"""The demos from photographs to results, shrunk to seconds: every step runs, and what is printed was measured."""

import json

import numpy as np
import pytest
from PIL import Image

from bsq_ray.demos import compress_demo, generate_demo

pytestmark = pytest.mark.slow

SMALL = ("model.encoder.width=32", "model.encoder.layers=1", "model.decoder.width=32", "model.decoder.layers=1")
SMALL += ("training.evaluate_every=1000000", "loss.adversarial.weight=0")
SMALL_TOKENS = ("model.width=32", "model.layers=1", "training.evaluate_every=1000000")


@pytest.fixture(scope="module")
def labelled(photo_folders, tmp_path_factory):
    """Photographs of two classes by their brightness."""
    photos = [Image.open(path).convert("RGB").resize((96, 80)) for path in sorted(photo_folders[0].iterdir())]
    return by_brightness(photos, tmp_path_factory.mktemp("labelled"))


def by_brightness(photos, folder):
    photos = sorted(photos, key=lambda photo: np.asarray(photo).mean())
    for number, photo in enumerate(photos):
        kind = folder / ("dark" if number < len(photos) // 2 else "light")
        kind.mkdir(exist_ok=True)
        photo.save(kind / f"{number}.png")
    return folder


def test_compression_compares_on_photographs_that_no_model_saw(labelled, photos, tmp_path, ray_local):
    images = tmp_path / "images"
    images.mkdir()
    photos[2].resize((192, 176)).save(images / "unseen.png")
    found = compress_demo.run_demo(images, tmp_path / "demo", 0.1, labelled, SMALL, SMALL_TOKENS)
    assert found["items"] == 1
    assert found["prior_saves"] < 1
    assert json.loads((tmp_path / "demo" / "evaluation" / "results.json").read_text())["set"] == str(images)
    assert (tmp_path / "demo" / "evaluation" / "curves.png").exists()
    with pytest.raises(ValueError, match="two or more class folders"):
        compress_demo.run_demo(images, tmp_path / "other", 0.1, images)


def test_too_few_photographs_are_refused_before_anything_is_trained(photos, tmp_path):
    folder = by_brightness([photo.resize((96, 80)) for photo in photos], tmp_path)
    with pytest.raises(ValueError, match="has too few photographs: .*, which are 2, and"):
        generate_demo.run_demo(folder, tmp_path / "demo", 0.1)
    assert not (tmp_path / "demo" / "tokenizer").exists()


def test_generation_shows_guidance_beside_the_frequencies(labelled, tmp_path, ray_local, monkeypatch):
    monkeypatch.setattr(generate_demo, "_GUIDANCE", (0.0, 2.0))
    done = generate_demo.run_demo(labelled, tmp_path, 0.1, SMALL, (*SMALL_TOKENS, "sampling.steps=2"), drawn=8)
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["guidance"]) == ["0", "2"]
    assert found["frequencies"].keys() == found["guidance"]["0"].keys()
    assert found["bits_per_token"] > 0 < found["bits_per_token_of_frequencies"]
    assert done.sheet.exists()
    assert all(f"\n{name} " in done.summary for name in ("0", "2", "frequencies"))
    assert f"{found['guidance']['2']['kid']:.4f}" in done.summary
