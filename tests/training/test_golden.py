"""Golden losses: the first steps of a small demo preset match recorded values.

A refactoring must not change them. After an intended change run `pytest tests/training/test_golden.py
--regenerate-golden`, and state the reason in the commit.
"""

import json
from pathlib import Path

import pytest
from small_runs import RecordingReporter, local_worker
from test_engine import UNCOMPARED

from bsq_ray.config import load_config
from bsq_ray.training.run_spec import RunSpec
from bsq_ray.training.trainer import run_training

GOLDEN = Path(__file__).parent.parent / "golden" / "demo-losses.json"
# Smaller than the preset, with fixed values for all keys that may be tuned.
SHRUNK = [
    "model.image_size=32",
    "model.encoder.width=32",
    "model.encoder.layers=2",
    "model.decoder.width=32",
    "model.decoder.layers=2",
    "model.decoder.head_hidden_dim=64",
    "loss.perceptual_weight=0.1",
    "loss.adversarial.start_step=0",
    "loss.adversarial.channel_base=256",
    "loss.adversarial.channel_max=16",
    "loss.adversarial.r1_every=4",
    "data.resize_range=[1.0, 1.5]",
    "training.batch_size=8",
    "training.steps=6",
    "training.optimizer.base_learning_rate=4e-3",
    "training.schedule.warmup_steps=2",
    "training.engine.precision=fp32",
    "training.log_every=1",
    "training.eval_samples=16",
]


def test_demo_losses_match_golden_file(photo_shards, tmp_path, request):
    """The first losses of the demo preset are the recorded ones."""
    listener = RecordingReporter()
    run_training(RunSpec(load_config("demo-gan", SHRUNK), photo_shards, str(tmp_path)), local_worker(listener))
    measured = [
        {key: value for key, value in record.items() if key not in UNCOMPARED and key != "progress"}
        for record in listener.training_records
    ]
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    for record, expected in zip(measured, json.loads(GOLDEN.read_text()), strict=True):
        assert record.keys() == expected.keys()
        for key, value in expected.items():
            # Six steps amplify rounding differences between processors.
            assert record[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (record["step"], key)
