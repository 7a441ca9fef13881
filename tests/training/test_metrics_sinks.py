"""Trackers of a run: MLflow, Weights & Biases, and trackers that fail."""

import json
import subprocess
import sys

import pytest

from bsq_ray.config import load_config
from bsq_ray.training.monitoring import metrics_log, metrics_sinks
from bsq_ray.training.monitoring.metrics_log import MetricsLog
from bsq_ray.training.monitoring.metrics_sinks import check_trackers

RECORDS = [{"kind": "training", "step": step, "loss/generator": 1.0 / step, "device": "cpu"} for step in (1, 2)]


class FailingSink:
    """A tracker whose service is unreachable."""

    def __init__(self):
        self.num_writes = 0

    def write(self, record):
        self.num_writes += 1
        raise ConnectionError("unreachable")


def test_failing_tracker_warns_once_and_is_dropped(tmp_path, monkeypatch):
    """Records still reach metrics.jsonl, with one warning."""
    sink, warnings = FailingSink(), []
    monkeypatch.setattr(metrics_log, "build_tracker", lambda *_: sink)
    log = MetricsLog(str(tmp_path), 0, trackers=["mlflow"], on_warning=warnings.append)
    for record in RECORDS:
        log.write(record)
    log.close()
    assert sink.num_writes == 1
    assert warnings == ["mlflow receives no further records: ConnectionError: unreachable"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_tracker_failing_at_start_warns(tmp_path, monkeypatch):
    def fail(*_):
        raise ConnectionError("unreachable")

    warnings = []
    monkeypatch.setattr(metrics_log, "build_tracker", fail)
    MetricsLog(str(tmp_path), 0, trackers=["wandb"], on_warning=warnings.append).close()
    assert warnings == ["wandb receives no further records: ConnectionError: unreachable"]


def test_missing_tracker_package_raises_with_extra(monkeypatch):
    """The error of a tracker that is not installed names the extra."""
    monkeypatch.setattr(metrics_sinks.importlib.util, "find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=r'wandb is not installed; install "bsq-ray\[trackers\]", or remove wandb'):
        check_trackers(["tensorboard", "wandb"])


def test_mlflow_resumed_run_continues_same_run(tmp_path, monkeypatch):
    """Scalars and parameters reach MLflow, and a resumed log continues the same MLflow run."""
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out, run_config = str(tmp_path / "run"), load_config("demo-gan")
    for last_step, record in enumerate(RECORDS):
        warnings = []
        log = MetricsLog(out, last_step, trackers=["mlflow"], run_config=run_config, on_warning=warnings.append)
        log.write(record)
        log.close()
        assert not warnings
    client = MlflowClient()
    experiment = client.get_experiment_by_name("bsq_ray")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "training/loss/generator")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    assert run.data.params["training.seed"] == "0"
    assert run.info.run_name == "run"


WANDB_PROGRAM = """
import sys
from bsq_ray.training.monitoring.metrics_log import MetricsLog
log = MetricsLog(sys.argv[1], 0, trackers=["wandb"], on_warning=print)
log.write({"kind": "training", "step": 1, "loss": 0.5})
log.close()
"""


@pytest.mark.integration
def test_wandb_offline_writes_run(tmp_path, monkeypatch):
    """Scalars reach an offline run of Weights & Biases in the run's folder."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # In a process of its own, because W&B keeps a service process.
    process = subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    assert "receives no further records" not in process.stdout
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"training/loss" in file.read_bytes()
