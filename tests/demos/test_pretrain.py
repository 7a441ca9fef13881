"""Recipes of the models in the package, with tiny models: every step runs without Ray, and resumes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bsq_ray import Codec, Tokenizer, config, model_folder
from bsq_ray.cli import main
from bsq_ray.demos.pretrain import RECIPES, find_recipe, run_recipe
from bsq_ray.model_card import parse_model_card
from bsq_ray.shipped_models.catalog import DEFAULT_CODEC, DEFAULT_TOKENIZER

SIZES = ("width=32", "layers=1", "heads=2")
RUN = ("training.steps=2", "training.batch_size=4", "training.eval_samples=4")
OVERRIDES = (
    (
        *(f"model.{part}.{size}" for part in ("encoder", "decoder") for size in SIZES),
        "model.decoder.head_hidden_dim=32",
        "loss.perceptual_weight=0",
        *RUN,
    ),
    (*(f"model.{size}" for size in SIZES), *RUN),
)
# The import system reports Ray as not installed.
RUN_WITHOUT_RAY = """
import json, sys
from dataclasses import replace
from pathlib import Path

sys.modules["ray"] = None
from bsq_ray.demos.pretrain import find_recipe, run_recipe

train, held_out, out, overrides = json.loads(sys.argv[1])
recipe = replace(
    find_recipe("photo"),
    collect=lambda folder: (Path(train), Path(held_out)),
    licenses=lambda: {"samples": "CC0"},
    num_crops=2,
    max_side=160,
)
options = dict(device="cpu", models_folder=Path(out, "shipped"), overrides=tuple(map(tuple, overrides)))
run_recipe(recipe, Path(out, "work"), **options)
"""


@pytest.fixture(scope="module")
def small_photos(photos, tmp_path_factory):
    """(train, held_out): folders of small photos."""
    folder = tmp_path_factory.mktemp("photos")
    for index, photo in enumerate(photos[:8]):
        path = folder / ("train" if index < 6 else "held_out") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        photo.resize((160, 140)).save(path)
    return folder / "train", folder / "held_out"


def test_recipes_train_the_default_models():
    recipe = find_recipe("photo")
    names = [config.load_config(preset).name for preset in (recipe.tokenizer_preset, recipe.prior_preset)]
    assert names == [DEFAULT_TOKENIZER, DEFAULT_CODEC]


def test_recipe_presets_have_tokens_of_one_kind():
    """The prior of a recipe codes the tokens of its tokenizer."""
    for recipe in RECIPES:
        tokenizer, prior = (
            config.load_config(preset).model for preset in (recipe.tokenizer_preset, recipe.prior_preset)
        )
        assert prior.grid == (tokenizer.frames, tokenizer.grid_size, tokenizer.grid_size)
        assert prior.bits == tokenizer.quantizer.bits
        if prior.order == "plane":
            assert all(bits % prior.sub_bits == 0 for bits in tokenizer.quantizer.keep)


def test_pretrain_without_recipe_lists_recipes(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(["pretrain"])
    assert not exit_.value.code
    assert capsys.readouterr().out == (
        "photo: tokenizer and prior for photos of any size (presets photo, photo-prior)\n"
    )


def test_photo_recipe_uses_photos_with_licenses(tmp_path, monkeypatch):
    from bsq_ray.samples import training_photos

    monkeypatch.setattr(training_photos, "collect_training_photos", lambda *folders: folders)
    assert find_recipe("photo").collect(tmp_path) == (tmp_path / "photos", tmp_path / "packages")
    licenses = find_recipe("photo").licenses()
    assert licenses["gcompris-qt-data"].startswith("GPL-3+")
    assert "mate-backgrounds" in licenses


def test_recipe_runs_without_ray_and_resumes(small_photos, tmp_path, photos):
    arguments = json.dumps([*map(str, small_photos), str(tmp_path), OVERRIDES])
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_RAY, arguments], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shipped = tmp_path / "shipped" / "photo-prior"
    codec, image = Codec.from_pretrained(str(shipped)), photos[0].resize((150, 100))
    data = codec.compress(image).data
    assert codec.decompress(data).size == image.size
    for folder in (shipped, shipped / "tokenizer"):
        card = parse_model_card((folder / "README.md").read_text())
        assert card.fields["data"] == "photos of the packages samples"
        assert (card.fields["licenses"], card.fields["seeds"]) == ("samples: CC0", "0")
        assert card.fields["recipe"].startswith("`bsq-ray pretrain photo`, preset photo")
        assert card.fields["weights"].startswith("float16, rounded from the float32 weights of model ")
        assert card.fields["steps"] == "2"
        assert any(name.startswith("held_out/") for name in card.metrics)
        assert str(tmp_path) not in (folder / "README.md").read_text() + (folder / "config.yaml").read_text()
    # The prior learned the tokens of the rounded tokenizer, which is the one that is shipped.
    prior_config = model_folder.load_model_folder_config(str(shipped)).model
    assert prior_config.tokenizer == Tokenizer.from_pretrained(str(shipped / "tokenizer")).model_id
    # Photos that are packed are not collected again.
    recipe = replace(find_recipe("photo"), collect=lambda folder: 1 / 0, num_crops=2)
    again = run_recipe(recipe, tmp_path / "work", device="cpu", models_folder=tmp_path / "again", overrides=OVERRIDES)
    assert Codec.from_pretrained(str(again)).compress(image).data == data


def test_recipe_without_time_raises(tmp_path):
    with pytest.raises(ValueError, match="--minutes -1 must be positive"):
        run_recipe(find_recipe("photo"), tmp_path, minutes=-1)
    assert not list(tmp_path.iterdir())
