"""Training of the demo's tokenizer: throughput, data wait, start-up time, and recovery from a lost worker."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.benchmark
# The discriminator trains from the first step, so that all steps cost the same.
_RUN_OVERRIDES = [
    "training.steps=100000",
    "training.log_every=1",
    "training.checkpoint_every=20",
    "training.eval_samples=16",
]
_RUN_OVERRIDES += ["training.eval_every=100000", "training.sample_every=100000", "loss.adversarial.start_step=0"]
_WARM_UP, _TIMED = 30, 150


class Run:
    """`bsq-ray train` in its own process, observed through the records it writes."""

    def __init__(self, shards, out, workers):
        command = ["train", "tokenizer", "--config", "demo-gan", "--data", shards, "--out", str(out)]
        command += ["--workers", str(workers), *_RUN_OVERRIDES]
        self.log = out / "metrics.jsonl"
        self.start_time = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from bsq_ray.cli.main import main; main()", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def records(self):
        """Return the records that the run has logged."""
        return list(map(json.loads, self.log.read_text().splitlines())) if self.log.exists() else []

    def wait_for_step(self, step):
        """Wait until a step is reached; return its record."""
        while True:
            assert self.process.poll() is None
            reached = [r for r in self.records() if r["kind"] == "training" and r["step"] >= step]
            if reached:
                return reached[0]
            time.sleep(0.05)

    def kill_worker(self):
        """Kill one of the workers; return the seconds until the next step."""
        workers = [p for p in psutil.Process(self.process.pid).children(recursive=True) if "TrainWorker" in p.name()]
        workers[-1].kill()
        killed = time.monotonic()
        # The log is truncated to the newest checkpoint; then a second start record follows.
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
    """Return images per second between two records, and the fraction of that time spent waiting for data."""
    seconds = after["seconds"] - before["seconds"]
    waited = after["data_wait"] * after["seconds"] - before["data_wait"] * before["seconds"]
    return 16 * (after["step"] - before["step"]) / seconds, waited / seconds


def test_scaling_speed(photo_shards, tmp_path, record):
    speeds, starts, waits = {}, {}, {}
    for workers in (0, 1, 2):
        run = Run(photo_shards, tmp_path / f"{workers}", workers)
        try:
            run.wait_for_step(1)
            starts[workers] = time.monotonic() - run.start_time
            first = run.wait_for_step(_WARM_UP)
            speeds[workers], waits[workers] = throughput(first, run.wait_for_step(_WARM_UP + _TIMED))
            checkpoints = [record for record in run.records() if record["kind"] == "checkpoint"]
            recovery_s = run.kill_worker() if workers == 2 else 0.0
        finally:
            run.stop()
    for workers, images_per_s in speeds.items():
        values = {"images_per_s": images_per_s, "data_wait": waits[workers], "first_step_s": starts[workers]}
        record("training-throughput-cpu", str(workers), **values)
    record("training-recovery-cpu", "restart", min_s=recovery_s, max_s=recovery_s)
    blocking_s = [checkpoint["blocking_seconds"] for checkpoint in checkpoints]
    record("training-recovery-cpu", "blocking", min_s=min(blocking_s), max_s=max(blocking_s))
    published_s = [checkpoint["seconds"] for checkpoint in checkpoints]
    record("training-recovery-cpu", "published", min_s=min(published_s), max_s=max(published_s))
