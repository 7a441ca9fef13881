"""Fine-tuning of the shipped tokenizer on other photos never makes it much worse, from the first step on."""

import json

import pytest

from bsq_ray.config import load_config
from bsq_ray.training.launch import train

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
_MAX_INCREASE = 1.1
# Small crops and batches, so that a step takes a second on two cores. The learning rates, which scale with the batch,
# are those of the preset, and are reached early.
_SMALL = ["model.image_size=64", "training.batch_size=8", "training.steps=100", "training.eval_every=10"]
_SMALL += ["training.optimizer.base_learning_rate=3.2e-3", "training.optimizer.muon.base_learning_rate=9.6e-3"]
_SMALL += ["training.schedule.warmup_steps=20"]


def test_fine_tuning_keeps_held_out_lpips(photo_shards, held_out_shards, tmp_path):
    """The evaluation before the first step is that of the shipped model."""
    run_config = load_config("photo-fine-tune", [*_SMALL, "training.sample_every=1000"])
    train(run_config, photo_shards, str(tmp_path / "run"), 0, held_out_url=held_out_shards, init_url="photo")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lpips = {r["step"]: r["held_out/perceptual"] for r in records if "held_out/perceptual" in r}
    assert list(lpips) == [*range(0, 101, 10)]
    assert max(lpips.values()) <= _MAX_INCREASE * lpips[0], lpips
