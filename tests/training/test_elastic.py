"""Elastic runs: fewer workers after a node is lost, more when capacity is added, and the same losses."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from process_group import spawn_group
from small_runs import train_runs
from test_resume import comparable_values

# Slow enough for nodes to change during training, and smooth enough for comparing losses after many steps.
LONG = [
    *(f"model.{half}.{key}" for half in ("encoder", "decoder") for key in ("width=64", "layers=2")),
    *("loss.adversarial.weight=0", "training.steps=100000", "training.checkpoint_every=5"),
    "training.optimizer.base_learning_rate=1e-3",
]


@pytest.fixture(scope="module")
def elastic_records(photo_shards, tmp_path_factory):
    """(folder, records) of a run on a cluster whose nodes change."""
    out = tmp_path_factory.mktemp("elastic")
    program = Path(__file__).with_name("elastic_run.py")
    process = subprocess.run(
        [sys.executable, program, photo_shards, str(out), *LONG], capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return out, json.loads((out / "records.json").read_text())


@pytest.mark.slow
@pytest.mark.long
def test_elastic_run_shrinks_and_grows(elastic_records):
    """A run continues with fewer workers when a node is lost and grows again when there is capacity."""
    _, records = elastic_records
    assert [record["workers"] for record in records if record["kind"] == "start"] == [2, 1, 2, 1]
    assert {record["batch_size"] for record in records if record["kind"] == "start"} == {16}
    reasons = [record["reason"] for record in records if record["kind"] == "restart"]
    assert reasons[0] == "a node is draining; all steps are saved"
    assert reasons[1] == "capacity for more workers is available; all steps are saved"
    assert reasons[2].startswith("workers were lost (")


@pytest.mark.slow
@pytest.mark.long
def test_elastic_preemption_notice_loses_no_step(elastic_records):
    """After a preemption notice no training step is lost."""
    _, records = elastic_records
    [*_, last_restart] = [n for n, record in enumerate(records) if record["kind"] == "restart"]
    steps = [record["step"] for record in records[:last_restart] if record["kind"] == "training"]
    assert all(after == before + 1 for before, after in pairwise(steps))


@pytest.mark.slow
@pytest.mark.long
def test_elastic_losses_match_fixed_run(elastic_records, photo_shards, tmp_path):
    """An elastic run logs the losses of a run whose nodes never change."""
    out, _ = elastic_records
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    elastic = [record for record in lines if record["kind"] == "training"]
    last = elastic[-1]["step"]
    assert [record["step"] for record in elastic] == list(range(1, last + 1))
    [fixed, _] = spawn_group(2, train_runs, photo_shards, tmp_path, {"fixed": LONG}, {"fixed": last})
    for record, expected in zip(elastic, fixed["fixed"], strict=True):
        for key, value in comparable_values(expected).items():
            assert record[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (record["step"], key)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["step"], summary["restarts"]) == (last, 3)
