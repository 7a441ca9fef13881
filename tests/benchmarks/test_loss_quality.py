"""Losses of the tokenizer after equal times: LPIPS alone, with the texture loss, and with each discriminator.

Numbers of steps are fixed, so that other programs on the machine do not matter: they are chosen so that every run takes
about the CPU time of `STEPS` steps with LPIPS alone. Single-threaded, so that two of these tests can run at once.
"""

import json
import statistics

import pytest
from seed_quality import SEEDS, quality_columns

from bsq_ray.config import load_config
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.training.launch import train

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("single_thread"), pytest.mark.timeout(14400)]
STEPS = 300
# Steps, preset and changes. Discriminators start at half of the steps, as in `demo-features`.
GRAM = "loss.gram_weight=30"
SETTINGS = {
    "lpips": (STEPS, "demo", ()),
    "gram": (290, "demo", (GRAM,)),
    "stylegan2": (250, "demo", ("loss.adversarial.weight=0.1", "loss.adversarial.start_step=125")),
    "features": (275, "demo-features", ("loss.adversarial.start_step=137",)),
    "features-gram": (268, "demo-features", ("loss.adversarial.start_step=134", GRAM)),
}
COMMON = ("training.eval_every=1000000", "training.sample_every=1000000", "training.checkpoint_every=1000000")


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_loss_quality(setting, labeled_shards, tmp_path, record):
    """Held-out quality; LPIPS (vgg) and KID are not part of any loss."""
    train_url, held_out_url = labeled_shards
    num_steps, preset, overrides = SETTINGS[setting]
    rows = []
    for seed in SEEDS:
        out = tmp_path / str(seed)
        run_config = load_config(preset, [*COMMON, *overrides, f"training.steps={num_steps}", f"training.seed={seed}"])
        train(run_config, train_url, str(out), 0)
        results = evaluate_reconstruction(f"{out}/model", held_out_url, f"{out}/evaluation", workers=0)
        rows.append(results["rows"]["model"])
    columns = quality_columns([row["psnr"] for row in rows], [row["lpips"] for row in rows])
    for name in ("lpips_vgg", "kid"):
        values = [row[name] for row in rows]
        columns |= {name: statistics.mean(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    record("loss-quality-cpu", setting, steps=num_steps, **columns)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_loss_step_time(setting, labeled_shards, tmp_path, record):
    """Time of a step with all terms; needs an idle core."""
    _, preset, overrides = SETTINGS[setting]
    changes = ["training.steps=30", "training.log_every=10", "loss.adversarial.start_step=0"]
    run_config = load_config(preset, [*COMMON, *overrides, *changes])
    train(run_config, labeled_shards[0], str(tmp_path / "run"), 0)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Without the first steps, and without evaluations.
    speeds = [each["images_per_second"] for each in records if each.get("step", 0) > 10 and "images_per_second" in each]
    record("loss-quality-cpu", setting, step_s=run_config.training.batch_size / statistics.mean(speeds))
