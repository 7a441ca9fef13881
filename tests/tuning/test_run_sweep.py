"""Sweeps on Ray: results, released resources, stops and failures."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from small_sweeps import SMALL_OVERRIDES, small_sweep

from bsq_ray.config import load_config
from bsq_ray.training.checkpoints.writer import newest_progress
from bsq_ray.training.launch import Interrupted, train
from bsq_ray.tuning.run_sweep import run_sweep
from bsq_ray.tuning.study import read_records
from bsq_ray.tuning.sweep_config import load_sweep

DEMO = Path(__file__).parents[2] / "jobs" / "sweeps" / "demo.yaml"
# A useful learning rate, and two that are worse at every step.
LEARNING_RATES = {"training.optimizer.base_learning_rate": {"values": [0.2, 1e-9, 1e-8]}}
ASHA = {"kind": "asha", "grace_period": 20, "reduction_factor": 2}


def free_resources():
    """Return the free resources of the cluster, without object store memory, which varies over time."""
    import ray

    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU", "memory")}


def wait_until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)
    return condition()


@pytest.fixture(scope="module")
def demo(photo_shards, held_out_shards, tmp_path_factory, ray_local):
    """(folder, result, events, free resources before) of the shipped demo sweep, shortened."""
    folder = tmp_path_factory.mktemp("demo")
    raw_sweep = yaml.safe_load(DEMO.read_text())
    raw_sweep["overrides"] |= SMALL_OVERRIDES
    raw_sweep["space"] = {name: {"values": parameter["values"][:1]} for name, parameter in raw_sweep["space"].items()}
    raw_sweep["space"]["model.quantizer.bits"]["values"] = [6, 10]
    raw_sweep["budget"] |= {"steps": 10, "held_out_images": 4}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(raw_sweep))
    free = free_resources()
    events = []
    result = run_sweep(
        load_sweep(str(folder / "sweep.yaml")),
        photo_shards,
        held_out_shards,
        str(folder / "out"),
        on_event=lambda event, record, study: events.append((event, record.number)),
    )
    return folder / "out", result, events, free


def test_run_sweep_writes_table_preset_plots_and_readme(demo):
    """A finished sweep writes a results table, the best preset, plots and a README."""
    out, result, events, _ = demo
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert [(row["trial"], row["state"], row["param.model.quantizer.bits"]) for row in table] == [
        (0, "finished", 6),
        (1, "finished", 10),
    ]
    for row in table:
        assert row["bits_per_pixel"] == row["param.model.quantizer.bits"] / 64
        evaluation = json.loads((out / f"trials/{row['trial']:03}/evaluation/results.json").read_text())
        assert row["lpips"] == evaluation["rows"]["model"]["lpips"]
    assert [row["best"] for row in table].index(True) == result.best.number
    readme = (out / "README.md").read_text()
    assert "2 of 2 trials of the preset `demo`: 2 finished." in readme
    for plot_name in ("rate-distortion.png", "curves.png"):
        assert plot_name in readme
        assert (out / plot_name).read_bytes().startswith(b"\x89PNG")
    assert {event for event, _ in events} == {"report", "end"}
    assert not (out / "ray").exists()


def test_run_sweep_trial_is_normal_run_with_reports(demo):
    """Each trial is a normal training run that reports intermediate metrics."""
    out, result, _, _ = demo
    for record in result.study.records:
        folder = out / "trials" / f"{record.number:03}"
        assert (folder / "model" / "model.safetensors").exists()
        assert list((folder / "checkpoints").iterdir())
        assert json.loads((folder / "summary.json").read_text())["workers"] == 1
        assert (
            load_config(str(folder / "config.yaml")).model.quantizer.bits == record.parameters["model.quantizer.bits"]
        )
        assert [step for step, _ in record.reports] == [0, 5, 10]
        assert all("psnr" in metrics for _, metrics in record.reports)


def test_train_accepts_best_preset(demo, photo_shards, tmp_path):
    """The best preset of a sweep can be trained, with the steps of its base preset."""
    out, result, _, _ = demo
    best = load_config(str(out / "best.yaml"))
    assert best.model.quantizer.bits == result.best.parameters["model.quantizer.bits"]
    assert best.training.steps == load_config("demo").training.steps
    trial_config = load_config(str(out / "trials" / f"{result.best.number:03}" / "config.yaml"))
    assert best.model == trial_config.model
    assert best.loss == trial_config.loss
    short_config = load_config(str(out / "best.yaml"), ["training.steps=1"])
    assert train(short_config, photo_shards, str(tmp_path / "run"), 0, on_record=lambda record: None).is_finished


def test_run_sweep_releases_all_resources(demo):
    """All cluster resources are free again after a sweep."""
    _, _, _, free = demo
    assert wait_until(lambda: free_resources() == free, 20), (free, free_resources())


def test_run_sweep_existing_folder_raises(demo, photo_shards, held_out_shards, tmp_path):
    """A folder that already contains a sweep or other files is not overwritten."""
    out, result, _, _ = demo
    with pytest.raises(ValueError, match=r"already contains this sweep; resume it with --resume"):
        run_sweep(result.study.sweep, photo_shards, held_out_shards, str(out))
    with pytest.raises(ValueError, match=r"contains another sweep \(.*space.* differ\)"):
        run_sweep(small_sweep(tmp_path), photo_shards, held_out_shards, str(out), resume=True)
    with pytest.raises(ValueError, match=r"is not empty and contains no sweep"):
        run_sweep(small_sweep(tmp_path), photo_shards, held_out_shards, str(tmp_path))


def test_run_sweep_finished_sweep_trains_nothing(demo, photo_shards, held_out_shards):
    """Resuming a finished sweep trains no trial again."""
    out, result, _, _ = demo
    modified_at = (out / "trials/000/checkpoints").stat().st_mtime_ns
    resumed_result = run_sweep(result.study.sweep, photo_shards, held_out_shards, str(out), resume=True)
    assert resumed_result.best.number == result.best.number
    assert (out / "trials/000/checkpoints").stat().st_mtime_ns == modified_at


@pytest.mark.slow
@pytest.mark.long
def test_run_sweep_early_stop_releases_resources(photo_shards, held_out_shards, tmp_path, ray_local):
    """Trials that ASHA stops early save a model and release their resources."""
    # Long compared with the delay of a stop request.
    overrides = {"training.eval_every": 20, "training.log_every": 20}
    budget = {"steps": 600, "max_concurrent_trials": 2, "held_out_images": 2}
    sweep = small_sweep(tmp_path, space=LEARNING_RATES, scheduler=ASHA, budget=budget, overrides=overrides)
    free = free_resources()
    result = run_sweep(sweep, photo_shards, held_out_shards, str(tmp_path / "out"))
    states = [record.state for record in result.study.records]
    assert "stopped" in states
    assert "finished" in states
    for record in result.study.records:
        if record.state == "stopped":
            assert 20 <= record.reports[-1][0] < 600
            assert record.parameters["training.optimizer.base_learning_rate"] < 1e-3
            assert (tmp_path / "out" / "trials" / f"{record.number:03}" / "model").exists()
    assert wait_until(lambda: free_resources() == free, 20), (free, free_resources())


@pytest.mark.slow
def test_run_sweep_killed_trial_resumes_from_checkpoint(photo_shards, held_out_shards, tmp_path, ray_local):
    """A killed trial restarts once and resumes from its newest checkpoint."""
    sweep = small_sweep(
        tmp_path,
        overrides={"training.checkpoint_every": 20},
        space={"model.quantizer.bits": {"values": [6]}},
        budget={"steps": 200, "max_concurrent_trials": 1, "held_out_images": 2},
    )
    from ray._private.state import actors

    free = free_resources()
    killed_pids = []

    def kill_once(event, record, study):
        checkpoints = tmp_path / "out/trials/000/checkpoints"
        if event == "report" and not killed_pids and checkpoints.exists() and record.reports[-1][0] >= 40:
            live_actors = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
            # Tune's name for a class with parameters.
            [pid] = [actor["Pid"] for actor in live_actors if actor["ActorClassName"].endswith("_Inner")]
            os.kill(pid, signal.SIGKILL)
            killed_pids.append(pid)

    result = run_sweep(sweep, photo_shards, held_out_shards, str(tmp_path / "out"), on_event=kill_once)
    [record] = result.study.records
    assert killed_pids
    assert (record.state, record.num_attempts, record.retry_reasons) == (
        "finished",
        2,
        ["the trial's process was lost"],
    )
    steps = [
        line["step"]
        for line in map(json.loads, (tmp_path / "out/trials/000/metrics.jsonl").read_text().splitlines())
        if line["kind"] == "training"
    ]
    assert steps == list(range(5, 201, 5))
    assert "- trial 0 retried: the trial's process was lost" in (tmp_path / "out/README.md").read_text()
    assert wait_until(lambda: free_resources() == free, 20), (free, free_resources())


@pytest.mark.slow
@pytest.mark.long
def test_run_sweep_records_invalid_diverged_and_failed(photo_shards, held_out_shards, tmp_path, ray_local):
    """Invalid, diverging and failing trials are recorded with their reason and do not end the sweep."""
    space = {
        "case": {
            "choices": {
                "fine": {"model.quantizer.bits": 6},
                "no configuration": {"model.image_size": 33},
                "does not fit the workers": {"training.batch_size": 7},
                "diverges": {"training.optimizer.base_learning_rate": 1e30, "training.steps": 60},
                "cannot read": {"data.max_skipped_samples": 0, "data.shuffle_block_size": 1},
            }
        }
    }
    damaged_shards = tmp_path / "shards"
    damaged_shards.mkdir()
    for file in Path(photo_shards).iterdir():
        (damaged_shards / file.name).write_bytes(file.read_bytes())
    tar = sorted(damaged_shards.glob("*.tar"))[-1]
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 4 // 5])
    sweep = small_sweep(
        tmp_path,
        space=space,
        budget={"max_concurrent_trials": 2, "workers": 2, "held_out_images": 2},
        overrides={"training.steps": 10},
    )
    result = run_sweep(sweep, str(damaged_shards), held_out_shards, str(tmp_path / "out"))
    records = {record.parameters["case"]: record for record in result.study.records}
    assert {case: record.state for case, record in records.items()} == {
        "fine": "finished",
        "no configuration": "invalid",
        "does not fit the workers": "invalid",
        "diverges": "diverged",
        "cannot read": "failed",
    }
    assert "image_size 33 is not a multiple of patch_size 8" in records["no configuration"].reason
    assert "batch_size 7 cannot be shared evenly by 2 workers" in records["does not fit the workers"].reason
    assert "is not finite" in records["diverges"].reason
    assert (records["cannot read"].num_attempts, records["fine"].num_attempts) == (2, 1)
    readme = (tmp_path / "out/README.md").read_text()
    for record in records.values():
        assert record.reason in readme


@pytest.mark.slow
@pytest.mark.long
def test_run_sweep_interrupted_sweep_resumes(photo_shards, held_out_shards, tmp_path, ray_local):
    """An interrupted sweep resumes its running trial and does not repeat finished trials."""
    space = {"model.quantizer.bits": {"values": [6, 10, 12]}}
    sweep = small_sweep(tmp_path, space=space, budget={"steps": 400, "max_concurrent_trials": 1, "held_out_images": 2})
    out = tmp_path / "out"

    interrupted_at = []

    def interrupt(event, record, study):
        # Once, because a second Ctrl-C would not wait.
        if event == "report" and record.number == 1 and record.reports[-1][0] >= 20 and not interrupted_at:
            interrupted_at.append(record.reports[-1][0])
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after 1 of 3 trials"):
        run_sweep(sweep, photo_shards, held_out_shards, str(out), on_event=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [record.state for record in read_records(str(out))] == ["finished", "running"]
    modified_at = (out / "trials/000/checkpoints").stat().st_mtime_ns
    checkpoint_step = newest_progress(str(out / "trials/001")).step

    result = run_sweep(sweep, photo_shards, held_out_shards, str(out), resume=True)
    assert [record.state for record in result.study.records] == ["finished"] * 3
    assert [record.num_attempts for record in result.study.records] == [1, 2, 1]
    assert (out / "trials/000/checkpoints").stat().st_mtime_ns == modified_at
    records = [json.loads(line) for line in (out / "trials/001/metrics.jsonl").read_text().splitlines()]
    assert 20 <= checkpoint_step < 400
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, checkpoint_step]


@pytest.mark.slow
@pytest.mark.long
def test_sweep_command_ctrl_c_saves_and_prints_resume(photo_shards, held_out_shards, tmp_path):
    """Ctrl-C ends the sweep command after saving and prints the command that resumes it."""
    small_sweep(tmp_path, budget={"steps": 100000, "max_concurrent_trials": 1, "held_out_images": 2})
    out = tmp_path / "out"
    arguments = [
        "sweep",
        "--config",
        str(tmp_path / "small.yaml"),
        "--data",
        photo_shards,
        "--held-out",
        held_out_shards,
    ]
    command = [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *arguments, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    wait_until(
        lambda: any((out / "trials/000/checkpoints").glob("*/checkpoint.json")) or process.poll() is not None, 180
    )
    # To the whole process group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    reader.join()
    assert "stopped after 0 of 2 trials" in lines[-1]
    assert lines[-1].rstrip().endswith(f"--out {out} --resume")
    assert (out / "trials/000/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.long
def test_sweep_command_writes_to_object_storage(photo_shards, held_out_shards, tmp_path, bucket):
    """A sweep can write its output folder to object storage."""
    from bsq_ray import storage

    small_sweep(tmp_path, space={"model.quantizer.bits": {"values": [6]}}, budget={"steps": 5})
    arguments = [
        "sweep",
        "--config",
        str(tmp_path / "small.yaml"),
        "--data",
        photo_shards,
        "--held-out",
        held_out_shards,
    ]
    command = [
        sys.executable,
        "-c",
        "from bsq_ray.cli.main import main; main()",
        *arguments,
        "--out",
        f"{bucket}/sweep",
    ]
    # In a separate Ray, whose processes have the bucket's credentials.
    completed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-2000:]
    files = storage.list_folder(f"{bucket}/sweep")
    assert {"README.md", "best.yaml", "results.parquet", "sweep.yaml", "trials"} <= set(files)
    assert "ray" not in files
    assert load_config(f"{bucket}/sweep/best.yaml").model.quantizer.bits == 6
