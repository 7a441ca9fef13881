"""Asynchronous checkpoints: complete or invisible, and retried while storage is unavailable."""

import errno
import os
import shutil
import signal
import tempfile
import threading

import fsspec
import pytest
import torch
import torch.multiprocessing as mp
from fsspec.implementations.memory import MemoryFileSystem
from process_group import spawn_group
from safetensors import SafetensorError
from small_runs import STEPS, RecordingReporter, local_worker, small_spec, train_runs
from test_resume import EVERY_STEP, HALF, assert_identical, comparable_values, load_weights

from bsq_ray import storage
from bsq_ray.training.checkpoints.host_snapshot import copy_to_host, torch_save_writer
from bsq_ray.training.checkpoints.writer import CheckpointWriter, RunProgress, list_checkpoints
from bsq_ray.training.trainer import run_training

AT_HALF = [f"training.checkpoint_every={HALF}"]


@pytest.fixture(scope="module")
def reference_run(photo_shards, tmp_path_factory):
    """(folder, listener) of an undisturbed run."""
    out, listener = tmp_path_factory.mktemp("undisturbed"), RecordingReporter()
    run_training(small_spec(photo_shards, out / "run"), local_worker(listener))
    return out, listener


def assert_same_steps(listener, reference_run, first=1):
    assert [comparable_values(r) for r in listener.training_records] == [
        comparable_values(r) for r in reference_run[1].training_records[first - 1 :]
    ]


def test_copy_to_host_is_deep_and_on_cpu():
    """A host copy shares no storage with the original."""
    original = {"a": [torch.zeros(3), (torch.ones(2, requires_grad=True), {"rate": 0.1})], "n": 3}
    copied = copy_to_host(original)
    original["a"][0].fill_(7)
    original["a"][1][1]["rate"] = 0.2
    assert copied["a"][0].tolist() == [0, 0, 0]
    assert copied["a"][1][1] == {"rate": 0.1}
    assert not copied["a"][1][0].requires_grad


def test_checkpoint_is_async_and_holds_its_own_step(photo_shards, tmp_path, reference_run, monkeypatch):
    """Training continues while a checkpoint is written, and the checkpoint contains the state of its own step."""
    next_step = threading.Event()
    upload = storage.upload

    def slow(local, url):
        # Without a writer thread the next step would never start.
        assert "checkpoints" not in url or next_step.wait(60)
        upload(local, url)

    class Waker(RecordingReporter):
        def record(self, record):
            super().record(record)
            if record["kind"] == "training" and record["step"] == HALF + 1:
                next_step.set()

    monkeypatch.setattr(storage, "upload", slow)
    listener = Waker()
    run_training(small_spec(photo_shards, tmp_path / "run", AT_HALF), local_worker(listener))
    assert_same_steps(listener, reference_run)
    [half, last] = [record for record in listener.records if record["kind"] == "checkpoint"]
    assert (half["checkpoint"], last["checkpoint"]) == (HALF, STEPS)
    assert half["step"] > HALF
    assert half["blocking_seconds"] < half["seconds"]

    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:07d}")
    resumed = RecordingReporter()
    run_training(small_spec(photo_shards, tmp_path / "run"), local_worker(resumed))
    assert_same_steps(resumed, reference_run, HALF + 1)
    assert_identical(load_weights(tmp_path, "run"), load_weights(reference_run[0], "run"))


def train_and_kill_in_checkpoint(shards, out, step):
    """Train until killed at the upload of the second file of the checkpoint of `step`."""
    copied = []
    upload = storage.upload

    def upload_or_die(local, url):
        if f"step-{step:07d}" in url:
            copied.append(url)
        if len(copied) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        upload(local, url)

    storage.upload = upload_or_die
    run_training(small_spec(shards, out, EVERY_STEP), local_worker(RecordingReporter()))


def test_resume_after_kill_during_write_uses_previous(photo_shards, tmp_path, reference_run):
    """A run killed while writing a checkpoint resumes from the previous one."""
    process = mp.get_context("spawn").Process(
        target=train_and_kill_in_checkpoint, args=(photo_shards, str(tmp_path / "run"), HALF)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    half_written = tmp_path / "run" / "checkpoints" / f"step-{HALF:07d}"
    assert len([path for path in half_written.rglob("*") if path.is_file()]) == 1
    assert list_checkpoints(str(tmp_path / "run")) == [f"step-{HALF - 1:07d}"]
    listener = RecordingReporter()
    run_training(small_spec(photo_shards, tmp_path / "run"), local_worker(listener))
    assert_same_steps(listener, reference_run, HALF)
    assert_identical(load_weights(tmp_path, "run"), load_weights(reference_run[0], "run"))


class FlakyFileSystem(MemoryFileSystem):
    """Remote storage that fails `num_failures` times for paths that contain `failing_path`."""

    protocol = "outage"
    store, pseudo_dirs = {}, [""]
    failing_path, num_failures = "", 0

    def _maybe_fail(self, path):
        if FlakyFileSystem.num_failures and FlakyFileSystem.failing_path in str(path):
            FlakyFileSystem.num_failures -= 1
            raise OSError("503 Slow Down")

    def put_file(self, lpath, rpath, **options):
        self._maybe_fail(rpath)
        return super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, **options):
        self._maybe_fail(path)
        return super().pipe_file(path, value, **options)

    def cat_file(self, path, start=None, end=None, **options):
        self._maybe_fail(path)
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def flaky_storage(tmp_path):
    """URL on a `FlakyFileSystem`."""
    fsspec.register_implementation("outage", FlakyFileSystem, clobber=True)
    FlakyFileSystem.num_failures = 0
    return f"outage://{tmp_path.name}"


@pytest.mark.parametrize("failing_path", ["optim_states.pt", "step-0000002/checkpoint.json", "model.safetensors"])
def test_checkpoint_transient_storage_error_is_retried(photo_shards, flaky_storage, reference_run, failing_path):
    """Transient storage errors are retried with a warning, and the run completes."""
    FlakyFileSystem.failing_path, FlakyFileSystem.num_failures = failing_path, 2
    listener = RecordingReporter()
    result = run_training(small_spec(photo_shards, flaky_storage, AT_HALF), local_worker(listener))
    assert result.is_finished
    assert FlakyFileSystem.num_failures == 0
    warnings = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert len(warnings) == 2
    assert all(failing_path in text and "503 Slow Down; trying again" in text for text in warnings)
    assert_same_steps(listener, reference_run)
    assert list_checkpoints(flaky_storage) == [f"step-{HALF:07d}", f"step-{STEPS:07d}"]


def test_checkpoint_storage_timeout_raises(photo_shards, flaky_storage):
    """Storage that fails beyond the timeout ends the run with an error."""
    FlakyFileSystem.failing_path, FlakyFileSystem.num_failures = "optim_states.pt", 10**6
    with pytest.raises(
        RuntimeError, match=r"worker 0 cannot write the checkpoint of step 2: cannot write outage:.*503"
    ):
        run_training(
            small_spec(photo_shards, flaky_storage, [*AT_HALF, "training.storage_timeout_s=0.1"]),
            local_worker(RecordingReporter()),
        )
    assert list_checkpoints(flaky_storage) == []


def test_resume_unavailable_checkpoint_is_not_damaged(photo_shards, flaky_storage):
    """A checkpoint that is temporarily unavailable is retried, not skipped as damaged."""
    job = small_spec(photo_shards, flaky_storage, EVERY_STEP)
    run_training(job, local_worker(RecordingReporter(HALF)))
    FlakyFileSystem.failing_path, FlakyFileSystem.num_failures = f"step-{HALF:07d}/checkpoint.json", 2
    listener = RecordingReporter()
    run_training(job, local_worker(listener))
    warnings = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert len(warnings) == 2
    assert not any("damaged" in text for text in warnings)
    assert listener.training_records[0]["step"] == HALF + 1


def test_unavailable_samples_are_retried_not_skipped(photo_shards, flaky_storage, tmp_path, reference_run):
    """Samples on unavailable storage are requested again and not skipped as damaged."""
    for name in os.listdir(photo_shards):
        storage.upload(f"{photo_shards}/{name}", f"{flaky_storage}/shards/{name}")

    class OutageAtStart(RecordingReporter):
        def record(self, record):
            super().record(record)
            if record["kind"] == "start":
                # More failures than chunks are read ahead, so the chunk being trained on fails too.
                FlakyFileSystem.failing_path, FlakyFileSystem.num_failures = "shard-", 2000

    listener = OutageAtStart()
    result = run_training(small_spec(f"{flaky_storage}/shards", tmp_path / "run"), local_worker(listener))
    assert FlakyFileSystem.num_failures == 0
    assert not result.skipped_samples
    assert_same_steps(listener, reference_run)
    warnings = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert warnings
    assert all("503 Slow Down; trying again" in text for text in warnings)


def test_checkpoint_write_error_on_one_rank_ends_all(photo_shards, tmp_path):
    """A write error on one worker ends the run on all workers."""
    with pytest.raises(AssertionError, match="worker 1 cannot write the checkpoint of step 2"):
        spawn_group(2, train_with_full_disk, photo_shards, tmp_path)


def train_with_full_disk(rank, world, shards, out):
    def full(local, url):
        raise storage.StorageUnavailableError(f"cannot write {url}: No space left on device")

    if rank == 1:
        storage.upload = full
    return train_runs(rank, world, shards, out, {"run": [*AT_HALF, "training.storage_timeout_s=0"]})


def failing_writer(error):
    def fail(path):
        raise error

    return fail


def write_to_full_disk(path):
    path.symlink_to("/dev/full")
    torch_save_writer({"weights": torch.zeros(100_000)})(path)


def write_checkpoint_with(out, write):
    """Write a checkpoint with one file that `write` produces."""
    writer = CheckpointWriter(
        str(out), local_worker(RecordingReporter()), num_to_keep=1, timeout_s=0.0, on_published=print
    )
    writer.save(RunProgress(3, 48, 1.0, 1, "", ""), {"state/weights": write})
    writer.wait()


@pytest.mark.parametrize(
    "write",
    [
        write_to_full_disk,
        failing_writer(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        failing_writer(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        failing_writer(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ],
    ids=["torch", "system", "quota", "safetensors"],
)
def test_checkpoint_temp_disk_full_names_remedy(tmp_path, write):
    """A full temporary disk is reported with its folder, its free space and what to do."""
    message = (
        r"worker 0 cannot write the checkpoint of step 3: state/weights cannot be written to the scratch folder "
        rf"{tempfile.gettempdir()}/\w+, where \d+ MB are free \(.+\); free space there, or set TMPDIR"
    )
    with pytest.raises(RuntimeError, match=message):
        write_checkpoint_with(tmp_path, write)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), r"\[Errno 5\] Input/output error"),
        (SafetensorError("I/O error: Input/output (os error 5)"), r"I/O error: Input/output \(os error 5\)"),
        (RuntimeError("CUDA error: an illegal memory access"), "CUDA error: an illegal memory access"),
        (TypeError("cannot pickle a lock"), "cannot pickle a lock"),
        (MemoryError(), r"MemoryError\(\)"),
    ],
)
def test_checkpoint_other_write_error_is_unchanged(tmp_path, error, message):
    """Errors other than a full disk are reported with their own message."""
    with pytest.raises(RuntimeError, match=f"^worker 0 cannot write the checkpoint of step 3: {message}$"):
        write_checkpoint_with(tmp_path, failing_writer(error))
