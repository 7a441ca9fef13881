"""The job scripts under `ray job submit`, on a head node with token authentication."""

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
from small_job import TINY_OVERRIDES
from typer.main import get_command

from bsq_ray.cli.main import app
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress

JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_job_help_shows_options_of_its_command(job):
    """Each job script accepts the options of its command."""
    completed = subprocess.run([sys.executable, job, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    command = re.search(r"Usage: bsq-ray (.*?) \[OPTIONS\]", completed.stdout)[1]
    assert set(command.split()) - {"data"} <= set(job.stem.split("_"))


def leaf_commands(command, path=()):
    """Yield (path, command) of each command without subcommands."""
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        yield path, command
    for name, subcommand in subcommands.items():
        yield from leaf_commands(subcommand, (*path, name))


def test_cluster_commands_have_a_job():
    """Every command with an --address option has a job script."""
    commands = {
        path for path, command in leaf_commands(get_command(app)) if any(p.name == "address" for p in command.params)
    }
    assert ("train",) in commands
    # `serve` does not end; a cluster serves with `serve deploy`.
    for path in commands - {("serve",)}:
        stages = ("tokenizer", "masked-lm", "prior") if path == ("train",) else ("",)
        for stage in stages:
            words = {word for part in (*path, stage) for word in part.split("-") if word} - {"data"}
            assert any(words <= set(job.stem.split("_")) for job in JOBS), (path, stage)


def test_runtime_env_is_accepted_by_ray():
    """Ray accepts the runtime environment of the jobs."""
    from ray.runtime_env import RuntimeEnv

    settings = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    assert all(isinstance(value, str) for value in settings["env_vars"].values())
    assert RuntimeEnv(**settings)["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"


@pytest.fixture(scope="module")
def head():
    # In /tmp, because the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))
    try:
        with head_node(folder, cpus=6) as head_process:
            yield head_process
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_job_submit_wrong_token_is_rejected(head, tmp_path):
    """A submission with a wrong token is rejected and runs nothing."""
    marker = tmp_path / "ran"
    wrong_token = tmp_path / "token"
    wrong_token.write_text("another-token-" + "1" * 40)
    completed = head.ray(
        *("job", "submit", "--address", head.address, "--", "touch", str(marker)), RAY_AUTH_TOKEN_PATH=str(wrong_token)
    )
    assert completed.returncode != 0
    assert "auth" in (completed.stdout + completed.stderr).lower()
    assert not marker.exists()


@pytest.mark.slow
def test_jobs_pack_and_train(head, photo_folders, tmp_path):
    """Jobs pack photos into shards and train on them."""
    shards, out = tmp_path / "shards", tmp_path / "run"
    pack_job = head.submit(
        "python", "jobs/pack.py", str(photo_folders[0]), str(shards), "--max-side", "96", name="pack"
    )
    assert pack_job.returncode == 0, pack_job.stdout + pack_job.stderr
    assert (shards / "manifest.parquet").exists()

    run_options = ["--data", str(shards), "--out", str(out), "--workers", "2"]
    train_job = head.submit(
        *(
            "python",
            "jobs/train_tokenizer.py",
            "--config",
            "demo-gan",
            *run_options,
            *TINY_OVERRIDES,
            "training.steps=10",
        ),
        name="train",
    )
    assert train_job.returncode == 0, train_job.stdout + train_job.stderr
    assert "trained 10 steps" in train_job.stdout
    assert head.status("train") == "SUCCEEDED"
    assert json.loads((out / "summary.json").read_text())["workers"] == 2
    Tokenizer.from_pretrained(str(out / "model"))


@pytest.mark.slow
def test_job_failure_is_reported_in_its_log(head, tmp_path):
    """A job with invalid input fails, and its log gives the reason."""
    run_options = ["--data", str(tmp_path), "--out", str(tmp_path / "run")]
    completed = head.submit("python", "jobs/train_tokenizer.py", "--config", "demo-gan", *run_options, name="fails")
    assert completed.returncode == 1
    assert head.status("fails") == "FAILED"
    assert "bsq-ray: " in completed.stdout
    assert "`bsq-ray data index" in completed.stdout


@pytest.mark.slow
@pytest.mark.long
def test_job_stopped_job_resumes_from_checkpoint(head, photo_shards, tmp_path):
    """A stopped job saves a checkpoint, and the same submission resumes from it."""
    out = tmp_path / "run"
    run_options = ["--data", photo_shards, "--out", str(out), "--workers", "2", "--resume"]
    job = ["python", "jobs/train_tokenizer.py", "--config", "demo-gan", *run_options, *TINY_OVERRIDES]
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

    # The number of steps may change on resume.
    resumed_job = head.submit(*job, f"training.steps={step + 5}", name="goes-on")
    assert resumed_job.returncode == 0, resumed_job.stdout + resumed_job.stderr
    assert f"trained {step + 5} steps" in resumed_job.stdout
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
