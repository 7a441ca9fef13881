"""Sweeps so small that starting the workers dominates the time of a trial."""

import yaml

from bsq_ray.tuning.sweep_config import load_sweep

SMALL_OVERRIDES = {
    "model.image_size": 32,
    "model.encoder": {"width": 16, "layers": 1, "heads": 2},
    "model.decoder": {"width": 16, "layers": 1, "heads": 2, "head_hidden_dim": 32},
    "loss.perceptual_weight": 0,
    "loss.adversarial.weight": 0,
    "training.engine.kind": "ddp",
    "training.engine.precision": "fp32",
    "training.batch_size": 8,
    "training.eval_every": 5,
    "training.eval_samples": 16,
    "training.log_every": 5,
}


def small_sweep(folder, *, overrides=None, **changes):
    """Return a sweep of two tokenizers of 6 and 10 bits, with some of its keys changed."""
    raw_sweep = {
        "name": "small",
        "preset": "demo",
        "overrides": SMALL_OVERRIDES | (overrides or {}),
        "space": {"model.quantizer.bits": {"values": [6, 10]}},
        "metrics": {"psnr": "max"},
        "budget": {"steps": 10, "max_concurrent_trials": 2, "held_out_images": 2},
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({**raw_sweep, **changes}, sort_keys=False))
    return load_sweep(str(file))
