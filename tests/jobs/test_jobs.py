"""What `ray job submit` runs, on a head node with token authentication."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from head_node import REPOSITORY, head_node
from small_job import TINY
from typer.main import get_command

from bsq_ray.cli.main import app
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress

JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_takes_the_options_of_its_command(job):
    done = subprocess.run([sys.executable, job, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = re.search(r"Usage: bsq-ray (.*?) \[OPTIONS\]", done.stdout)[1]
    assert set(command.split()) - {"data"} <= set(job.stem.split("_"))


def leaves(command, path=()):
    """(path, command) of each command that has none below it."""
    below = getattr(command, "commands", {})
    if not below:
        yield path, command
    for name, part in below.items():
        yield from leaves(part, (*path, name))


def test_every_command_that_can_work_on_a_cluster_has_a_job():
    commands = {path for path, command in leaves(get_command(app)) if any(p.name == "address" for p in command.params)}
    assert ("train",) in commands
    # It never ends; cluster/ says how a cluster serves.
    for path in commands - {("serve",)}:
        stages = ("tokenizer", "masked-lm", "prior") if path == ("train",) else ("",)
        for stage in stages:
            words = {word for part in (*path, stage) for word in part.split("-") if word} - {"data"}
            assert any(words <= set(job.stem.split("_")) for job in JOBS), (path, stage)


def test_the_environment_of_jobs_is_one_that_ray_accepts():
    from ray.runtime_env import RuntimeEnv

    settings = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    assert all(isinstance(value, str) for value in settings["env_vars"].values())
    assert RuntimeEnv(**settings)["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


@pytest.fixture(scope="module")
def head():
    # Below /tmp, because the path of a socket may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))
    try:
        with head_node(folder, cpus=6) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_without_the_token_nothing_is_run(head, tmp_path):
    mark = tmp_path / "ran"
    other = tmp_path / "token"
    other.write_text("another-token-" + "1" * 40)
    refused = head.ray(
        *("job", "submit", "--address", head.address, "--", "touch", str(mark)), RAY_AUTH_TOKEN_PATH=str(other)
    )
    assert refused.returncode != 0
    assert "auth" in (refused.stdout + refused.stderr).lower()
    assert not mark.exists()


@pytest.mark.slow
def test_photographs_are_packed_and_trained_on_by_jobs(head, photo_folders, tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "run"
    packed = head.submit("python", "jobs/pack.py", str(photo_folders[0]), str(shards), "--max-side", "96", name="pack")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    assert (shards / "manifest.parquet").exists()

    where = ["--data", str(shards), "--out", str(out), "--workers", "2"]
    trained = head.submit(
        *("python", "jobs/train_tokenizer.py", "--config", "demo", *where, *TINY, "training.steps=10"), name="train"
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "trained 10 steps" in trained.stdout
    assert head.status("train") == "SUCCEEDED"
    assert json.loads((out / "summary.json").read_text())["workers"] == 2
    Tokenizer.from_pretrained(str(out / "model"))


@pytest.mark.slow
def test_a_job_that_cannot_work_fails_and_its_log_says_why(head, tmp_path):
    where = ["--data", str(tmp_path), "--out", str(tmp_path / "run")]
    failed = head.submit("python", "jobs/train_tokenizer.py", "--config", "demo", *where, name="fails")
    assert failed.returncode == 1
    assert head.status("fails") == "FAILED"
    assert "bsq-ray: " in failed.stdout
    assert "`bsq-ray data index" in failed.stdout


@pytest.mark.slow
def test_a_stopped_job_leaves_a_checkpoint_and_the_same_submission_goes_on(head, photo_shards, tmp_path):
    out = tmp_path / "run"
    where = ["--data", photo_shards, "--out", str(out), "--workers", "2", "--resume"]
    job = ["python", "jobs/train_tokenizer.py", "--config", "demo", *where, *TINY]
    assert head.submit(*job, "training.steps=100000", name="long", wait=False).returncode == 0
    deadline = time.monotonic() + 150
    while not list_checkpoints(str(out)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert head.ray("job", "stop", "--address", head.address, "long").returncode == 0
    assert head.status("long") == "STOPPED"
    logs = head.ray("job", "logs", "--address", head.address, "long").stdout
    step = int(re.search(r"stopped after step (\d+); checkpoint and model are saved", logs)[1])
    assert newest_progress(str(out)).step == step
    Tokenizer.from_pretrained(str(out / "model"))

    # Another number of steps is not another run.
    went_on = head.submit(*job, f"training.steps={step + 5}", name="goes-on")
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    assert f"trained {step + 5} steps" in went_on.stdout
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
