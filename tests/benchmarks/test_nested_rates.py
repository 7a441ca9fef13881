"""One tokenizer with nested bits against a tokenizer for each rate, and against cutting the bits of an ordinary one.

Nested bits are trained for the steps of one of these tokenizers, and for those of all four together. Single-threaded,
so that another benchmark can run at the same time.
"""

import statistics

import pytest
from seed_quality import SEEDS, quality_columns

from bsq_ray.config import load_config
from bsq_ray.evaluation.compression.rate_distortion import bd_rates
from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
from bsq_ray.training.launch import train

pytestmark = [pytest.mark.benchmark, pytest.mark.usefixtures("single_thread"), pytest.mark.timeout(14400)]
STEPS = 400
RATES = (6, 9, 12, 18)
PATCH_PIXELS = 64
# Steps of the tokenizers with nested bits.
NESTED_STEPS = {"nested": STEPS, "nested-long": STEPS * len(RATES)}
# 1.0 M parameters instead of 6.9 M, so that eighteen trainings take minutes.
SMALL = (
    "model.encoder={width: 128, layers: 2, heads: 2}",
    "model.decoder={width: 128, layers: 2, heads: 2, head_hidden_dim: 512}",
    "training.eval_every=1000000",
    "training.sample_every=1000000",
    "training.checkpoint_every=1000000",
)


def train_and_measure(preset, overrides, steps, seed, shards, out, **rows):
    """Return the held-out metrics of a tokenizer, by number of bits."""
    run_config = load_config(preset, [*SMALL, *overrides, f"training.steps={steps}", f"training.seed={seed}"])
    train(run_config, shards[0], str(out), 0)
    results = evaluate_reconstruction(f"{out}/model", shards[1], f"{out}/evaluation", workers=0, **rows)["rows"]
    bits = run_config.model.quantizer.bits
    by_row = {"model": bits} | {f"{k} bits": k for k in rows.get("bits", ())}
    by_row |= {f"cut to {k} bits": k for k in rows.get("cut_bits", ())}
    return {k: results[row] for row, k in by_row.items()}


def to_curve(metrics_by_bits):
    return [
        {"bits_per_pixel": k / PATCH_PIXELS, "psnr": row["psnr"], "lpips": row["lpips"]}
        for k, row in sorted(metrics_by_bits.items())
    ]


def test_nested_rates(labeled_shards, tmp_path, record):
    """Means over the seeds at every rate, and the BD-rates of nested bits against a tokenizer for each rate."""
    results = {"nested": [], "nested-long": [], "separate": [], "cut": []}
    for seed in SEEDS:
        out = tmp_path / str(seed)
        for name, steps in NESTED_STEPS.items():
            measured = train_and_measure("demo-nested", (), steps, seed, labeled_shards, out / name, bits=RATES[:-1])
            results[name].append(measured)
        separate = {}
        for k in RATES:
            cut_bits = {"cut_bits": RATES[:-1]} if k == RATES[-1] else {}
            overrides = [f"model.quantizer.bits={k}"]
            measured = train_and_measure("demo", overrides, STEPS, seed, labeled_shards, out / f"bits-{k}", **cut_bits)
            separate[k] = measured[k]
        results["separate"].append(separate)
        results["cut"].append(measured)
    record_results(results, record)


def record_results(results, record):
    for name, per_seed in results.items():
        for k in RATES:
            psnr, lpips = ([metrics[k][key] for metrics in per_seed] for key in ("psnr", "lpips"))
            record("nested-rates-cpu", f"{name}-{k}", **quality_columns(psnr, lpips))
    for name in NESTED_STEPS:
        for metric in ("psnr", "lpips"):
            rates = [
                bd_rates({"separate": to_curve(separate), name: to_curve(nested)}, "separate", metric)[name]
                for separate, nested in zip(results["separate"], results[name], strict=True)
            ]
            columns = {"": statistics.mean(rates), "_min": min(rates), "_max": max(rates)}
            columns = {f"bd_rate{suffix}": rate / 100 for suffix, rate in columns.items()}
            record("nested-bd-rates-cpu", f"{name}-{metric}", **columns)
