"""cluster/slurm.sh: the command that a Slurm job runs on every node, recorded by a fake `srun`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import symmetric_run

from bsq_ray.cli.main import app

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sh"
TRAIN = "train tokenizer --config demo --data shards --out runs/a --workers 16 training.steps=5"


@pytest.fixture
def run_job(tmp_path):
    """Function that runs the script as Slurm would on two nodes; returns the process and what `srun` received."""
    record = tmp_path / "srun.json"
    fakes = {
        "scontrol": '#!/bin/bash\n[[ $* == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"\n',
        "srun": f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(record)!r}, 'w'))\n"
        "sys.exit(int(os.environ.get('STATUS', '0')))\n",
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(arguments, **environment):
        slurm = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_NUM_NODES": "2", "BIN_FOLDER": str(tmp_path)}
        command = [str(SCRIPT), *arguments.split()]
        process = subprocess.run(command, env=os.environ | slurm | environment, capture_output=True, text=True)
        return process, json.loads(record.read_text()) if record.exists() else None

    return run


def test_slurm_script_runs_command_on_first_node(run_job):
    """Every node starts Ray with the first node as head; options are those of Slurm's task, Ray and bsq-ray."""
    process, (words, environment) = run_job(TRAIN, NETWORK_INTERFACE="ib0")
    assert process.returncode == 0, process.stderr
    split = words.index("--")
    ray_words, command = words[:split], words[split + 1 :]
    assert ray_words[:4] == ["--nodes=2", "--ntasks=2", "ray", "symmetric-run"]
    assert ray_words[4:8] == ["--address", "node3:6379", "--min-nodes", "2"]
    valid_options = {option for parameter in (*start.params, *symmetric_run.params) for option in parameter.opts}
    assert {word.split("=")[0] for word in ray_words[4:] if word.startswith("--")} <= valid_options
    assert command == ["bsq-ray", *TRAIN.split(), "--address", "auto"]
    assert (environment["NCCL_SOCKET_IFNAME"], environment["RAY_AUTH_MODE"]) == ("ib0", "token")
    train = typer.main.get_command(app).commands["train"]
    parameters = train.make_context("train", command[2:]).params
    assert (parameters["address"], parameters["overrides"]) == ("auto", ["training.steps=5"])


def test_slurm_script_returns_status_of_command(run_job):
    """A run that was stopped after saving ends the job with its exit status."""
    assert run_job(TRAIN, STATUS="130")[0].returncode == 130


def test_slurm_script_without_command_fails(run_job):
    """Without a command nothing is started."""
    process, received = run_job("")
    assert (process.returncode, received) == (2, None)
    assert "no command" in process.stderr
