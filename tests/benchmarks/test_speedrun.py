"""Speedrun: training time of the demo tokenizer to a given quality on the held-out photos of the quickstart.

Model size, data and held-out photos are fixed; everything else may change. Every setting is trained with three seeds,
the baseline, which defines the quality, with one: its time is compared.
"""

import json
import statistics

import pytest
from seed_quality import quality_columns

from bsq_ray.config import load_config
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.training.launch import train

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(7200)]
# The quality of the quickstart after 1,455 steps with AdamW and the discriminator.
TARGET_PSNR_DB, TARGET_LPIPS = 20.3, 0.238
# Rows of docs/results/speedrun.json: preset, changes and seeds.
SETTINGS = {
    "baseline": ("demo-gan", ["training.steps=1455"], (0,)),
    "demo-460": ("demo", ["training.steps=460", "training.optimizer.muon.base_learning_rate=6.4e-2"], (0, 1, 2)),
    "demo-520": ("demo", ["training.steps=520", "training.optimizer.muon.base_learning_rate=6.4e-2"], (0, 1, 2)),
}


@pytest.fixture(scope="module")
def shards(photo_folders, tmp_path_factory):
    """URLs of the training and held-out photos, packed as the quickstart packs them."""
    urls = [str(tmp_path_factory.mktemp(side)) for side in ("train", "held_out")]
    for folder, url in zip(photo_folders, urls, strict=True):
        pack_images(str(folder), url, PackOptions(max_side=256, num_workers=0))
    return urls


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_speedrun(setting, shards, tmp_path, record):
    train_url, held_out_url = shards
    preset, overrides, seeds = SETTINGS[setting]
    psnr, lpips, minutes = [], [], []
    for seed in seeds:
        out = tmp_path / str(seed)
        run_config = load_config(preset, [*overrides, f"training.seed={seed}", "training.eval_every=1000000"])
        train(run_config, train_url, str(out), 0, held_out_url=held_out_url)
        results = evaluate_reconstruction(f"{out}/model", held_out_url, str(out / "evaluation"), workers=0)
        psnr.append(results["rows"]["model"]["psnr"])
        lpips.append(results["rows"]["model"]["lpips"])
        minutes.append(json.loads((out / "summary.json").read_text())["duration_s"] / 60)
    record(
        "speedrun",
        setting,
        steps=run_config.training.steps,
        seeds=len(seeds),
        minutes=statistics.mean(minutes),
        **quality_columns(psnr, lpips),
        seeds_at_target=sum(p >= TARGET_PSNR_DB and q <= TARGET_LPIPS for p, q in zip(psnr, lpips, strict=True)),
    )
