"""Whole sweeps on Ray: what they leave, that nothing is held afterwards, and that they survive stops and failures."""

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
from small_sweeps import SMALL, small_sweep

from bsq_ray.config import load_config
from bsq_ray.training.checkpoints.writer import newest_progress
from bsq_ray.training.launch import Interrupted, train
from bsq_ray.tuning.run_sweep import run_sweep
from bsq_ray.tuning.study import read_records
from bsq_ray.tuning.sweep_config import load_sweep

DEMO = Path(__file__).parents[2] / "jobs" / "sweeps" / "demo.yaml"
# A learning rate that learns, and two that do not and are worse at every step.
RATES = {"training.optimizer.learning_rate_per_256": {"values": [0.2, 1e-9, 1e-8]}}
ASHA = {"kind": "asha", "grace_steps": 20, "reduction": 2}


def held():
    """What is free on the cluster, without the memory of the object store, which fills and empties by itself."""
    import ray

    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU", "memory")}


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.5)
    return true()


@pytest.fixture(scope="module")
def demo(photo_shards, held_out_shards, tmp_path_factory, ray_local):
    """(folder, what came of it, free resources before and after) of the shipped demo sweep, shrunk."""
    folder = tmp_path_factory.mktemp("demo")
    keys = yaml.safe_load(DEMO.read_text())
    keys["set"] |= SMALL
    keys["space"] = {name: {"values": parameter["values"][:1]} for name, parameter in keys["space"].items()}
    keys["space"]["model.quantizer.bits"]["values"] = [6, 10]
    keys["budget"] |= {"steps": 10, "held_out_images": 4}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(keys))
    free = held()
    events = []
    swept = run_sweep(
        load_sweep(str(folder / "sweep.yaml")),
        photo_shards,
        held_out_shards,
        str(folder / "out"),
        show=lambda event, record, study: events.append((event, record.number)),
    )
    return folder / "out", swept, events, free


def test_a_sweep_leaves_a_table_the_best_preset_plots_and_a_page(demo):
    out, swept, events, _ = demo
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert [(row["trial"], row["state"], row["param.model.quantizer.bits"]) for row in table] == [
        (0, "finished", 6),
        (1, "finished", 10),
    ]
    for row in table:
        assert row["bits_per_pixel"] == row["param.model.quantizer.bits"] / 64
        measured = json.loads((out / f"trials/{row['trial']:03}/evaluation/results.json").read_text())
        assert row["lpips"] == measured["rows"]["model"]["lpips"]
    assert [row["best"] for row in table].index(True) == swept.best.number
    page = (out / "README.md").read_text()
    assert "2 of 2 trials of the preset `demo`: 2 finished." in page
    for picture in ("rate-distortion.png", "curves.png"):
        assert picture in page
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert {event for event, _ in events} == {"report", "end"}
    assert not (out / "ray").exists()


def test_each_trial_is_an_ordinary_run_that_reports_along_the_way(demo):
    out, swept, _, _ = demo
    for record in swept.study.records:
        folder = out / "trials" / f"{record.number:03}"
        assert (folder / "model" / "model.safetensors").exists()
        assert list((folder / "checkpoints").iterdir())
        assert json.loads((folder / "summary.json").read_text())["workers"] == 1
        assert (
            load_config(str(folder / "config.yaml")).model.quantizer.bits == record.parameters["model.quantizer.bits"]
        )
        assert [step for step, _ in record.reports] == [0, 5, 10]
        assert all("psnr" in figures for _, figures in record.reports)


def test_training_takes_the_best_preset(demo, photo_shards, tmp_path):
    out, swept, _, _ = demo
    best = load_config(str(out / "best.yaml"))
    assert best.model.quantizer.bits == swept.best.parameters["model.quantizer.bits"]
    assert best.training.steps == load_config("demo").training.steps
    ran = load_config(str(out / "trials" / f"{swept.best.number:03}" / "config.yaml"))
    assert best.model == ran.model
    assert best.loss == ran.loss
    short = load_config(str(out / "best.yaml"), ["training.steps=1"])
    assert train(short, photo_shards, str(tmp_path / "run"), 0, on_record=lambda record: None).finished


def test_after_a_sweep_the_cluster_is_as_free_as_before(demo):
    _, _, _, free = demo
    assert wait_until(lambda: held() == free, 20), (free, held())


def test_a_folder_with_a_sweep_is_not_overwritten(demo, photo_shards, held_out_shards, tmp_path):
    out, swept, _, _ = demo
    with pytest.raises(ValueError, match=r"already holds this sweep; go on with it by --resume"):
        run_sweep(swept.study.sweep, photo_shards, held_out_shards, str(out))
    with pytest.raises(ValueError, match=r"holds another sweep \(.*space.* differ\)"):
        run_sweep(small_sweep(tmp_path), photo_shards, held_out_shards, str(out), resume=True)
    with pytest.raises(ValueError, match=r"is not empty and holds no sweep"):
        run_sweep(small_sweep(tmp_path), photo_shards, held_out_shards, str(tmp_path))


def test_a_sweep_that_is_done_is_not_done_again(demo, photo_shards, held_out_shards):
    out, swept, _, _ = demo
    before = (out / "trials/000/checkpoints").stat().st_mtime_ns
    again = run_sweep(swept.study.sweep, photo_shards, held_out_shards, str(out), resume=True)
    assert again.best.number == swept.best.number
    assert (out / "trials/000/checkpoints").stat().st_mtime_ns == before


@pytest.mark.slow
def test_trials_that_are_stopped_early_give_back_what_they_held(photo_shards, held_out_shards, tmp_path, ray_local):
    # Long beside the moment it takes until a trial hears that it is to stop.
    every = {"training.evaluate_every": 20, "training.log_every": 20}
    budget = {"steps": 600, "concurrency": 2, "held_out_images": 2}
    sweep = small_sweep(tmp_path, space=RATES, scheduler=ASHA, budget=budget, set=every)
    free = held()
    swept = run_sweep(sweep, photo_shards, held_out_shards, str(tmp_path / "out"))
    states = [record.state for record in swept.study.records]
    assert "stopped" in states
    assert "finished" in states
    for record in swept.study.records:
        if record.state == "stopped":
            assert 20 <= record.reports[-1][0] < 600
            assert record.parameters["training.optimizer.learning_rate_per_256"] < 1e-3
            assert (tmp_path / "out" / "trials" / f"{record.number:03}" / "model").exists()
    assert wait_until(lambda: held() == free, 20), (free, held())


@pytest.mark.slow
def test_a_trial_that_is_killed_is_begun_again_and_goes_on_from_its_checkpoint(
    photo_shards, held_out_shards, tmp_path, ray_local
):
    sweep = small_sweep(
        tmp_path,
        set={"training.checkpoint_every": 20},
        space={"model.quantizer.bits": {"values": [6]}},
        budget={"steps": 200, "concurrency": 1, "held_out_images": 2},
    )
    from ray._private.state import actors

    free = held()
    killed = []

    def kill(event, record, study):
        checkpoints = tmp_path / "out/trials/000/checkpoints"
        if event == "report" and not killed and checkpoints.exists() and record.reports[-1][0] >= 40:
            alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
            # Tune's name for a class with parameters.
            [pid] = [actor["Pid"] for actor in alive if actor["ActorClassName"].endswith("_Inner")]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    swept = run_sweep(sweep, photo_shards, held_out_shards, str(tmp_path / "out"), show=kill)
    [record] = swept.study.records
    assert killed
    assert (record.state, record.attempts, record.again) == ("finished", 2, ["the trial's process was lost"])
    steps = [
        line["step"]
        for line in map(json.loads, (tmp_path / "out/trials/000/metrics.jsonl").read_text().splitlines())
        if line["kind"] == "training"
    ]
    assert steps == list(range(5, 201, 5))
    assert "was begun again: the trial's process was lost" in (tmp_path / "out/README.md").read_text()
    assert wait_until(lambda: held() == free, 20), (free, held())


@pytest.mark.slow
def test_what_cannot_be_is_recorded_and_a_failing_trial_is_tried_again_and_ends_no_sweep(
    photo_shards, held_out_shards, tmp_path, ray_local
):
    space = {
        "case": {
            "choices": {
                "fine": {"model.quantizer.bits": 6},
                "no configuration": {"model.image_size": 33},
                "does not fit the workers": {"training.batch_size": 7},
                "diverges": {"training.optimizer.learning_rate_per_256": 1e30, "training.steps": 60},
                "cannot read": {"data.max_damaged": 0, "data.shuffle_window": 1},
            }
        }
    }
    damaged = tmp_path / "shards"
    damaged.mkdir()
    for file in Path(photo_shards).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tar = sorted(damaged.glob("*.tar"))[-1]
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 4 // 5])
    sweep = small_sweep(
        tmp_path, space=space, budget={"concurrency": 2, "workers": 2, "held_out_images": 2}, set={"training.steps": 10}
    )
    swept = run_sweep(sweep, str(damaged), held_out_shards, str(tmp_path / "out"))
    records = {record.parameters["case"]: record for record in swept.study.records}
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
    assert (records["cannot read"].attempts, records["fine"].attempts) == (2, 1)
    page = (tmp_path / "out/README.md").read_text()
    for record in records.values():
        assert record.reason in page


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_it_was_and_does_not_repeat_what_is_done(
    photo_shards, held_out_shards, tmp_path, ray_local
):
    space = {"model.quantizer.bits": {"values": [6, 10, 12]}}
    sweep = small_sweep(tmp_path, space=space, budget={"steps": 400, "concurrency": 1, "held_out_images": 2})
    out = tmp_path / "out"

    sent = []

    def interrupt(event, record, study):
        # Once, because the second Ctrl-C is not waited for.
        if event == "report" and record.number == 1 and record.reports[-1][0] >= 20 and not sent:
            sent.append(record.reports[-1][0])
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped after 1 of 3 trials"):
        run_sweep(sweep, photo_shards, held_out_shards, str(out), show=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [record.state for record in read_records(str(out))] == ["finished", "running"]
    done = (out / "trials/000/checkpoints").stat().st_mtime_ns
    stopped_at = newest_progress(str(out / "trials/001")).step

    swept = run_sweep(sweep, photo_shards, held_out_shards, str(out), resume=True)
    assert [record.state for record in swept.study.records] == ["finished"] * 3
    assert [record.attempts for record in swept.study.records] == [1, 2, 1]
    assert (out / "trials/000/checkpoints").stat().st_mtime_ns == done
    records = [json.loads(line) for line in (out / "trials/001/metrics.jsonl").read_text().splitlines()]
    assert 20 <= stopped_at < 400
    assert [r["step"] for r in records if r["kind"] == "start"] == [0, stopped_at]


@pytest.mark.slow
@pytest.mark.long
def test_the_command_stops_at_ctrl_c_and_the_same_command_goes_on(photo_shards, held_out_shards, tmp_path):
    small_sweep(tmp_path, budget={"steps": 100000, "concurrency": 1, "held_out_images": 2})
    out = tmp_path / "out"
    words = ["sweep", "--config", str(tmp_path / "small.yaml"), "--data", photo_shards, "--held-out", held_out_shards]
    command = [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *words, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines = []
    reading = threading.Thread(target=lambda: lines.extend(process.stderr))
    reading.start()
    wait_until(
        lambda: any((out / "trials/000/checkpoints").glob("*/checkpoint.json")) or process.poll() is not None, 180
    )
    # As a terminal does it: to everything that belongs to the command.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    reading.join()
    assert "stopped after 0 of 2 trials" in lines[-1]
    assert lines[-1].rstrip().endswith(f"--out {out} --resume")
    assert (out / "trials/000/model/model.safetensors").exists()


@pytest.mark.slow
def test_a_sweep_lives_in_a_bucket(photo_shards, held_out_shards, tmp_path, bucket):
    from bsq_ray import storage

    small_sweep(tmp_path, space={"model.quantizer.bits": {"values": [6]}}, budget={"steps": 5})
    words = ["sweep", "--config", str(tmp_path / "small.yaml"), "--data", photo_shards, "--held-out", held_out_shards]
    command = [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *words, "--out", f"{bucket}/sweep"]
    # In a Ray of its own, whose processes know where the bucket is.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    left = storage.list_folder(f"{bucket}/sweep")
    assert {"README.md", "best.yaml", "results.parquet", "sweep.yaml", "trials"} <= set(left)
    assert "ray" not in left
    assert load_config(f"{bucket}/sweep/best.yaml").model.quantizer.bits == 6
