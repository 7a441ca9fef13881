"""Starting a run: invalid arguments, the files it writes, and equal results on Ray, after faults and after Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from math import cos, pi

import psutil
import pytest
import safetensors.numpy
from process_group import spawn_group
from small_runs import PRESET, SMALL, STEPS, RecordingReporter, local_worker, small_spec, train_runs
from test_resume import assert_identical, comparable_values, load_weights

from bsq_ray import config
from bsq_ray.config import load_config
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress
from bsq_ray.training.launch import Interrupted, train
from bsq_ray.training.trainer import run_training


def launch(shards, out, workers, overrides=(), **settings):
    reporter = RecordingReporter()
    settings = {"on_record": reporter.record, **settings}
    return train(load_config(PRESET, [*SMALL, *overrides]), shards, str(out), workers, **settings), reporter


@pytest.fixture(scope="module")
def local_run(photo_shards, held_out_shards, tmp_path_factory):
    """(folder, result, reporter) of a run in this process."""
    out = tmp_path_factory.mktemp("local") / "run"
    overrides = ["training.eval_every=2", "training.sample_every=3"]
    return out, *launch(photo_shards, out, 0, overrides, held_out_url=held_out_shards)


def test_train_writes_all_run_artifacts(local_run):
    """A run leaves its configuration, records, sample images, a checkpoint and a model."""
    out, result, _ = local_run
    assert load_config(str(out / "config.yaml")).training.steps == STEPS
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "training"] == [1, 2, 3, 4]
    assert [(r["step"], r["weights"]) for r in records if r["kind"] == "evaluation"] == [
        (0, "raw"),
        (2, "raw"),
        (4, "ema"),
    ]
    image_names = ["step-0000000.png", "step-0000002.png", "step-0000003.png", "step-0000004.png"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == image_names
    assert list_checkpoints(str(out)) == ["step-0000004"]
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "summary.json").read_text())["step"] == result.step == STEPS
    Tokenizer.from_pretrained(str(out / "model"), weights="raw")
    assert safetensors.numpy.load_file(out / "model" / "discriminator.safetensors")


def test_model_card_metrics_match_published_weights(local_run, held_out_shards):
    """The metrics of the model card are those of the published weights."""
    import torch

    from bsq_ray.data.image_source import ImageSource
    from bsq_ray.data.manifest import read_manifest
    from bsq_ray.data.stream import evaluation_batches
    from bsq_ray.data.transforms import to_float, to_uint8

    out, result, _ = local_run
    [batch] = evaluation_batches(ImageSource(read_manifest(held_out_shards), config.DataConfig(), 16), 16, limit=16)
    reconstructed = Tokenizer.from_pretrained(str(out / "model")).reconstruct(to_float(batch.values_B))
    error_B = (to_uint8(reconstructed).float() - batch.values_B.float()).square().mean((1, 2, 3))
    psnr = float((10 * torch.log10(255**2 / error_B)).mean())
    assert result.metrics["held_out/psnr"] == pytest.approx(psnr, abs=1e-4)
    assert f"| held_out/psnr | {psnr:.5g} |" in (out / "model" / "README.md").read_text()


def test_start_record_has_scaled_learning_rate(local_run):
    """The start record contains the learning rate scaled with the batch size."""
    _, _, reporter = local_run
    [start] = [record for record in reporter.records if record["kind"] == "start"]
    per_256 = load_config(PRESET, SMALL).training.optimizer.base_learning_rate
    assert start["learning_rate"] == pytest.approx(per_256 * 16 / 256)
    assert (start["batch_size"], start["workers"]) == (16, 1)


def test_train_existing_run_without_resume_raises(local_run, photo_shards):
    """A folder that contains a run is not overwritten."""
    with pytest.raises(ValueError, match=r"already contains a run .*--resume"):
        launch(photo_shards, local_run[0], 0)


def test_resume_other_config_raises_before_start(local_run, photo_shards):
    """Resuming with another configuration is rejected before anything is written."""
    before = (local_run[0] / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="model.patch_size was 4 and is 8"):
        launch(photo_shards, local_run[0], 2, ["model.patch_size=8"], resume=True)
    assert (local_run[0] / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("workers", "settings", "overrides", "message"),
    [
        (3, {}, [], "batch_size 16 cannot be shared evenly by 3 workers; choose a multiple of 3"),
        (
            2,
            {},
            ["training.micro_batch_size=16", "training.batch_size=48"],
            r"24 of 48 images, 2 workers\) is not a multiple of training.micro_batch_size 16; choose a divisor of 24",
        ),
        (-1, {}, [], "workers -1 must be 0"),
        (2, {"min_workers": 0}, [], "workers 0-2 is not a valid range"),
        (2, {"min_workers": 3}, [], "workers 3-2 is not a valid range"),
        (0, {"minutes": 0.0}, [], "minutes 0.0 must be positive"),
    ],
)
def test_train_invalid_arguments_raise_before_start(photo_shards, tmp_path, workers, settings, overrides, message):
    """Arguments that do not fit together are rejected before anything is written."""
    with pytest.raises(ValueError, match=message):
        launch(photo_shards, tmp_path / "run", workers, overrides, **settings)
    assert not (tmp_path / "run").exists()


def test_time_limit_ends_run_and_schedule(photo_shards, tmp_path):
    """A time limit ends the run, with the schedule at its end."""
    overrides = ["training.steps=1000000", "training.engine.kind=ddp"]
    result, reporter = launch(photo_shards, tmp_path / "run", 0, overrides, minutes=0.05)
    assert result.is_finished
    assert result.duration_s >= 3
    records = reporter.training_records
    assert records[-1]["progress"] == 1
    for before, record in pairwise(records):
        factor = 0.5 * (1 + cos(pi * before["progress"]))
        assert record["learning_rate"] == pytest.approx(1e-3 * factor)


def test_ctrl_c_saves_and_run_resumes(photo_shards, tmp_path):
    """Ctrl-C saves checkpoint and model, and the run resumes from there."""

    def interrupt(record):
        if record["kind"] == "training" and record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after step 3; checkpoint and model are saved"):
        launch(photo_shards, tmp_path, 0, ["training.steps=6"], on_record=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    Tokenizer.from_pretrained(str(tmp_path / "model"))
    result, reporter = launch(photo_shards, tmp_path, 0, ["training.steps=6"], resume=True)
    assert result.is_finished
    assert [record["step"] for record in reporter.training_records] == [4, 5, 6]


def test_nonfinite_loss_stops_and_names_samples(photo_shards, tmp_path):
    """A nonfinite loss ends the run before the optimizer step and names the samples."""
    from bsq_ray.training.nonfinite import NonFiniteLossError

    # Overflows within a few steps.
    overrides = ["training.optimizer.base_learning_rate=1e30", "training.steps=40"]
    with pytest.raises(
        NonFiniteLossError, match=r"step \d+: the (loss \(.*\w.*\)|gradient of the \w+) is not finite; the batch"
    ):
        run_training(small_spec(photo_shards, tmp_path, overrides), local_worker(RecordingReporter()))
    record = json.loads((tmp_path / "nonfinite.json").read_text())
    assert len(record["keys"]) == 16
    assert not (tmp_path / "model").exists()


def test_ray_worker_matches_local_process(local_run, photo_shards, held_out_shards, tmp_path, ray_local):
    """A Ray worker takes the same steps as training in this process."""
    result, reporter = launch(photo_shards, tmp_path, 1, held_out_url=held_out_shards)
    assert result.is_finished
    for record, expected in zip(reporter.training_records, local_run[2].training_records, strict=True):
        for key, value in comparable_values(expected).items():
            assert record[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert not (tmp_path / "ray").exists()


LONG = ["training.steps=150", "training.log_every=5", "training.checkpoint_every=20"]


@pytest.mark.slow
def test_killed_worker_is_replaced_run_is_identical(photo_shards, tmp_path, ray_local):
    """A killed worker is replaced and the run ends with the weights of an undisturbed one."""
    spawn_group(2, train_runs, photo_shards, tmp_path, {"undisturbed": LONG})
    killed = []
    restarts = []

    def kill_one(record):
        if record["kind"] == "restart":
            restarts.append(record["reason"])
        if record["kind"] == "training" and record["step"] >= 40 and not killed:
            workers = [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in p.name()]
            killed.append(workers[-1].pid)
            os.kill(killed[0], signal.SIGKILL)

    result, _ = launch(photo_shards, tmp_path / "disturbed", 2, LONG, on_record=kill_one)
    assert result.is_finished
    assert killed
    assert len(restarts) == 1
    assert restarts[0].startswith("workers were lost (")
    assert result.restart_reasons == restarts
    summary = json.loads((tmp_path / "disturbed" / "summary.json").read_text())
    assert (summary["restarts"], summary["restart_reasons"]) == (1, restarts)
    records = [json.loads(line) for line in (tmp_path / "disturbed" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "training"] == list(range(5, 151, 5))
    assert_identical(load_weights(tmp_path, "disturbed"), load_weights(tmp_path, "undisturbed"))


@pytest.mark.slow
def test_worker_failure_ends_run_with_its_error(photo_shards, tmp_path, ray_local):
    """An error in one worker ends the run and is reported."""
    import shutil

    shards = tmp_path / "shards"
    shutil.copytree(photo_shards, shards)
    for tar in sorted(shards.glob("*.tar"))[1:]:
        tar.unlink()
    with pytest.raises((ValueError, RuntimeError), match=r"\.tar"):
        launch(str(shards), tmp_path / "run", 2, ["data.interleave=2", "data.max_skipped_samples=0"])


def train_command(shards, out, *more):
    """Return the command line of `bsq-ray train` on two workers."""
    start = [
        sys.executable,
        "-c",
        "from bsq_ray.cli.main import main; main()",
        "train",
        "tokenizer",
        "--config",
        PRESET,
    ]
    return [*start, "--data", shards, "--out", str(out), "--workers", "2", *SMALL, *LONG, *more]


def wait_for_checkpoint(out, process):
    deadline = time.monotonic() + 120
    while not list_checkpoints(str(out)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.long
def test_killed_command_resumes_identically(photo_shards, tmp_path):
    """A killed command resumes and ends with the weights of an uninterrupted one."""
    spawn_group(2, train_runs, photo_shards, tmp_path, {"undisturbed": LONG})
    out = tmp_path / "disturbed"
    process = subprocess.Popen(train_command(photo_shards, out), stderr=subprocess.DEVNULL)
    wait_for_checkpoint(out, process)
    # Ray's agents exit a minute later: they retry their connection to the dead head node.
    child_processes = [
        p for p in psutil.Process(process.pid).children(recursive=True) if not p.name().endswith("Agent")
    ]
    process.kill()
    process.wait()
    assert not (out / "model").exists()
    _, alive = psutil.wait_procs(child_processes, timeout=60)
    assert not alive
    resumed = subprocess.run([*train_command(photo_shards, out), "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "trained 150 steps" in resumed.stdout
    assert_identical(load_weights(tmp_path, "disturbed"), load_weights(tmp_path, "undisturbed"))


@pytest.mark.slow
@pytest.mark.long
def test_command_ctrl_c_prints_resume_command(photo_shards, tmp_path):
    """The command stops at Ctrl-C and prints the command that resumes it."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        train_command(photo_shards, out, "training.steps=100000"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    wait_for_checkpoint(out, process)
    # To the whole process group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    reader.join()
    assert any(line.startswith(f"run: {out}  Ray dashboard: http://127.0.0.1:") for line in lines)
    message = lines[-1]
    step = int(re.search(r"stopped after step (\d+)", message)[1])
    assert newest_progress(str(out)).step == step
    assert f"--out {out} --workers 2" in message
    assert message.rstrip().endswith("--resume")
    Tokenizer.from_pretrained(str(out / "model"))
