"""Training the demo's model as its user does: speed, waiting for data, start-up, and after a worker was lost."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.benchmark
# The discriminator learns from the first step, so that all steps are alike.
_RUN_OVERRIDES = [
    "training.steps=100000",
    "training.log_every=1",
    "training.checkpoint_every=20",
    "training.eval_batches=1",
]
_RUN_OVERRIDES += ["training.eval_every=100000", "training.sample_every=100000", "loss.adversarial.start_step=0"]
_WARM_UP, _TIMED = 30, 150


class Run:
    """`bsq-ray train` in a process of its own, followed by the records it writes."""

    def __init__(self, shards, out, workers):
        command = ["train", "tokenizer", "--config", "demo", "--data", shards, "--out", str(out)]
        command += ["--workers", str(workers), *_RUN_OVERRIDES]
        self.log = out / "metrics.jsonl"
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def records(self):
        """What the run has logged so far."""
        return list(map(json.loads, self.log.read_text().splitlines())) if self.log.exists() else []

    def wait_for_step(self, step):
        """Waits until a step is taken; returns its record."""
        while True:
            assert self.process.poll() is None
            reached = [r for r in self.records() if r["kind"] == "training" and r["step"] >= step]
            if reached:
                return reached[0]
            time.sleep(0.05)

    def kill_worker(self):
        """Kills one of the workers; returns how long no step is taken."""
        workers = [p for p in psutil.Process(self.process.pid).children(recursive=True) if "TrainWorker" in p.name()]
        workers[-1].kill()
        killed = time.monotonic()
        # The log is cut back to the newest checkpoint and goes on with another start.
        while [record["kind"] for record in self.records()].count("start") < 2:
            assert self.process.poll() is None
            time.sleep(0.05)
        while self.records()[-1]["kind"] != "training":
            assert self.process.poll() is None
            time.sleep(0.05)
        return time.monotonic() - killed

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)


def throughput(before, after):
    """Images per second between two records, and the share of that time spent waiting for data."""
    seconds = after["seconds"] - before["seconds"]
    waited = after["data_wait"] * after["seconds"] - before["data_wait"] * before["seconds"]
    return 16 * (after["step"] - before["step"]) / seconds, waited / seconds


def test_scaling_speed(photo_shards, tmp_path, record_measurement):
    names = {0: "in one process, without Ray", 1: "one Ray worker", 2: "two Ray workers"}
    speeds, starts, waits = {}, {}, {}
    for workers in names:
        run = Run(photo_shards, tmp_path / f"{workers}", workers)
        try:
            run.reach(1)
            starts[workers] = time.monotonic() - run.began
            first = run.reach(_WARM_UP)
            speeds[workers], waits[workers] = throughput(first, run.reach(_WARM_UP + _TIMED))
            checkpoints = [record for record in run.records() if record["kind"] == "checkpoint"]
            recovery_s = run.kill_worker() if workers == 2 else 0.0
        finally:
            run.end()
    for workers, name in names.items():
        ratio = f"{speeds[workers] / speeds[0]:.2f} x without Ray"
        what = f"training the demo's tokenizer, batch 16, {os.cpu_count()} cores, {name}"
        record_measurement(
            what, f"{speeds[workers]:.1f} images/s, {waits[workers]:.1%} of the time waiting for data", ratio
        )
    for workers, name in names.items():
        comparison = f"{starts[0]:.1f} s without Ray"
        record_measurement(f"from the command to the first step, {name}", f"{starts[workers]:.1f} s", comparison)
    record_measurement(
        "from a killed worker to the next step, two Ray workers",
        f"{recovery_s:.1f} s",
        f"{starts[2]:.1f} s from the command",
    )
    blocking_ms, whole = (
        1e3 * statistics.median(record[key] for record in checkpoints) for key in ("stall", "seconds")
    )
    record_measurement(
        "steps wait for a checkpoint, two Ray workers", f"{blocking_ms:.0f} ms", f"until it is visible {whole:.0f} ms"
    )
