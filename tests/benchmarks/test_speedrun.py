"""Speedrun: training time of the demo tokenizer to a given quality on the held-out photos of the quickstart.

Model size, data and held-out photos are fixed; everything else may change. Every setting is trained with three seeds.
"""

import json
import statistics

import pytest

from bsq_ray.config import load_config
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.training.launch import train

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(7200)]
# The quality of the quickstart after 1,455 steps with AdamW and the discriminator.
TARGET_PSNR_DB, TARGET_LPIPS = 20.3, 0.238
SEEDS = (0, 1, 2)
NO_GAN = ["training.engine.kind=ddp", "loss.adversarial.weight=0"]
SETTINGS = {
    "adamw-600": [*NO_GAN, "training.steps=600"],
    "muon-600": [*NO_GAN, "training.steps=600", "training.optimizer.kind=muon"],
    "muon-400": [*NO_GAN, "training.steps=400", "training.optimizer.kind=muon"],
}


@pytest.fixture(scope="module")
def shards(photo_folders, tmp_path_factory):
    """URLs of the training and held-out photos, packed as the quickstart packs them."""
    urls = [str(tmp_path_factory.mktemp(side)) for side in ("train", "held_out")]
    for folder, url in zip(photo_folders, urls, strict=True):
        pack_images(str(folder), url, PackOptions(max_side=256, num_workers=0))
    return urls


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_speedrun(setting, shards, tmp_path, record_measurement):
    train_url, held_out_url = shards
    runs = []
    for seed in SEEDS:
        out = tmp_path / str(seed)
        overrides = [*SETTINGS[setting], f"training.seed={seed}", "training.eval_every=1000000"]
        train(load_config("demo-gan", overrides), train_url, str(out), 0, held_out_url=held_out_url)
        results = evaluate_reconstruction(f"{out}/model", held_out_url, str(out / "evaluation"), workers=0)
        model, summary = results["rows"]["model"], json.loads((out / "summary.json").read_text())
        runs.append((model["psnr"], model["lpips"], summary["duration_s"] / 60, summary["step"]))
    psnr, lpips, minutes, steps = (list(values) for values in zip(*runs, strict=True))
    at_target = sum(p >= TARGET_PSNR_DB and q <= TARGET_LPIPS for p, q in zip(psnr, lpips, strict=True))
    quality = (
        f"{statistics.mean(psnr):.2f} dB ({min(psnr):.2f} to {max(psnr):.2f}), "
        f"LPIPS {statistics.mean(lpips):.3f} ({min(lpips):.3f} to {max(lpips):.3f})"
    )
    record_measurement(
        setting,
        f"{steps[0]} steps, {statistics.mean(minutes):.1f} min: {quality}",
        f"target {TARGET_PSNR_DB} dB and {TARGET_LPIPS}: {at_target} of {len(SEEDS)} seeds",
    )
