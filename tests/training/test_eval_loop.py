"""Evaluations during training: the same samples for any number of workers, and records that name what was measured."""

import numpy as np
import pytest
import torch
from process_group import spawn_group
from small_runs import RecordingReporter, small_spec

from bsq_ray.data.data_source import SampleBlock
from bsq_ray.data.stream import evaluation_share
from bsq_ray.training.trainer import Trainer
from bsq_ray.training.worker_context import WorkerContext

CASES = {"all": 1024, "not divisible": 5, "fewer than workers": 1}


def evaluate_all(rank, world_size, shards, held_out, out):
    """Evaluate an untrained model on each number of samples; return the measurements and the records of rank 0."""
    results = {}
    for name, num_samples in CASES.items():
        reporter = RecordingReporter()
        overrides = ["training.engine.kind=ddp", f"training.eval_samples={num_samples}", "training.micro_batch_size=4"]
        spec = small_spec(shards, f"{out}/{name}", overrides, held_out_url=held_out)
        trainer = Trainer(spec, WorkerContext(rank, world_size, torch.device("cpu"), "local", reporter))
        measurement = trainer.eval_loop.evaluate("raw")
        [record] = [record for record in reporter.records if record["kind"] == "evaluation"] or [None]
        results[name] = measurement, record
    return results


@pytest.fixture(scope="module")
def evaluations(photo_shards, held_out_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations")
    arguments = evaluate_all, photo_shards, held_out_shards
    return {
        "one": evaluate_all(0, 1, photo_shards, held_out_shards, out / "one"),
        "two": spawn_group(2, *arguments, str(out / "two"))[0],
        "training images": evaluate_all(0, 1, photo_shards, None, out / "train"),
    }


@pytest.mark.parametrize("case", CASES)
def test_evaluation_does_not_depend_on_worker_count(evaluations, case):
    """Two workers measure the same samples as one, with one sample, an odd number, or all."""
    [one, _], [two, _] = evaluations["one"][case], evaluations["two"][case]
    assert one.num_samples == two.num_samples
    assert one.metrics == pytest.approx(two.metrics, rel=1e-6)
    assert one.measured_on == two.measured_on


def test_evaluation_uses_configured_number_of_samples(evaluations, held_out_shards):
    counts = {name: measurement.num_samples for name, (measurement, _) in evaluations["one"].items()}
    assert (counts["not divisible"], counts["fewer than workers"]) == (5, 1)
    assert counts["all"] > 5
    metrics = [measurement.metrics["held_out/psnr"] for measurement, _ in evaluations["one"].values()]
    assert len(set(metrics)) == len(metrics)


@pytest.mark.parametrize(
    ("run", "split", "text"), [("one", "held_out", "held-out"), ("training images", "train", "training")]
)
def test_evaluation_record_names_data_count_and_precision(evaluations, held_out_shards, photo_shards, run, split, text):
    """Record and description name split, data set, number of samples and precision."""
    measurement, record = evaluations[run]["not divisible"]
    url = held_out_shards if split == "held_out" else photo_shards
    assert {key: record[key] for key in ("split", "data", "samples", "unit", "precision", "weights")} == {
        "split": split,
        "data": url,
        "samples": 5,
        "unit": "images",
        "precision": "fp32",
        "weights": "raw",
    }
    assert list(measurement.metrics) == [f"{split}/psnr"]
    assert measurement.measured_on == f"5 {text} images of {url} ({record['data_hash'][:12]}), fp32, raw weights"


@pytest.mark.parametrize(("num_samples", "limit", "world_size"), [(100, 10, 3), (7, 100, 2), (10, 4, 2), (1, 8, 3)])
def test_evaluation_share_is_evenly_spaced_and_disjoint(num_samples, limit, world_size):
    """The workers' parts are disjoint, together evenly spaced, and have equal numbers of blocks."""

    class Numbers:
        def __init__(self):
            self.num_samples = num_samples

        def read_eval(self, samples):
            return SampleBlock(np.array(samples), np.array(samples), [str(sample) for sample in samples])

    shares = [list(evaluation_share(Numbers(), 2, limit, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    keys = sorted(int(key) for share in shares for block in share for key in block.keys)
    total = min(num_samples, limit)
    assert keys == [index * (num_samples // total) for index in range(total)]
