"""Checkpoints are written beside the training, whole or not at all, and in spite of storage that fails for a while."""

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
from process_group import in_group
from safetensors import SafetensorError
from small_runs import STEPS, Listener, in_this_process, small_job, train_several
from test_resume import EVERY_STEP, HALF, assert_identical, numbers, weights

from bsq_ray import storage
from bsq_ray.training.checkpoints.host_snapshot import in_host_memory, pickled
from bsq_ray.training.checkpoints.writer import CheckpointWriter, Progress, list_checkpoints
from bsq_ray.training.trainer import run

AT_HALF = [f"training.checkpoint_every={HALF}"]


@pytest.fixture(scope="module")
def undisturbed(photo_shards, tmp_path_factory):
    """(folder, listener) of a run that nothing happens to."""
    out, listener = tmp_path_factory.mktemp("undisturbed"), Listener()
    run(small_job(photo_shards, out / "run"), in_this_process(listener))
    return out, listener


def assert_same_steps(listener, undisturbed, first=1):
    assert [numbers(r) for r in listener.training] == [numbers(r) for r in undisturbed[1].training[first - 1 :]]


def test_a_copy_shares_nothing_and_lies_in_host_memory():
    original = {"a": [torch.zeros(3), (torch.ones(2, requires_grad=True), {"rate": 0.1})], "n": 3}
    copied = in_host_memory(original)
    original["a"][0].fill_(7)
    original["a"][1][1]["rate"] = 0.2
    assert copied["a"][0].tolist() == [0, 0, 0]
    assert copied["a"][1][1] == {"rate": 0.1}
    assert not copied["a"][1][0].requires_grad


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_the_step_it_is_of(
    photo_shards, tmp_path, undisturbed, monkeypatch
):
    next_step = threading.Event()
    copy_in = storage.upload

    def slow(local, url):
        # Without a thread that writes, the next step would never come.
        assert "checkpoints" not in url or next_step.wait(60)
        copy_in(local, url)

    class Waker(Listener):
        def record(self, record):
            super().record(record)
            if record["kind"] == "training" and record["step"] == HALF + 1:
                next_step.set()

    monkeypatch.setattr(storage, "copy_in", slow)
    listener = Waker()
    run(small_job(photo_shards, tmp_path / "run", AT_HALF), in_this_process(listener))
    assert_same_steps(listener, undisturbed)
    [half, last] = [record for record in listener.records if record["kind"] == "checkpoint"]
    assert (half["checkpoint"], last["checkpoint"]) == (HALF, STEPS)
    assert half["step"] > HALF
    assert half["stall"] < half["seconds"]

    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:07d}")
    again = Listener()
    run(small_job(photo_shards, tmp_path / "run"), in_this_process(again))
    assert_same_steps(again, undisturbed, HALF + 1)
    assert_identical(weights(tmp_path, "run"), weights(undisturbed[0], "run"))


def die_while_writing(shards, out, step):
    """Trains, and is killed when the second file of the checkpoint of `step` is to be copied."""
    copied = []
    copy_in = storage.upload

    def deadly(local, url):
        if f"step-{step:07d}" in url:
            copied.append(url)
        if len(copied) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        copy_in(local, url)

    storage.upload = deadly
    run(small_job(shards, out, EVERY_STEP), in_this_process(Listener()))


def test_killed_while_it_writes_a_run_goes_on_from_the_checkpoint_before(photo_shards, tmp_path, undisturbed):
    process = mp.get_context("spawn").Process(
        target=die_while_writing, args=(photo_shards, str(tmp_path / "run"), HALF)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    half_written = tmp_path / "run" / "checkpoints" / f"step-{HALF:07d}"
    assert len([path for path in half_written.rglob("*") if path.is_file()]) == 1
    assert list_checkpoints(str(tmp_path / "run")) == [f"step-{HALF - 1:07d}"]
    listener = Listener()
    run(small_job(photo_shards, tmp_path / "run"), in_this_process(listener))
    assert_same_steps(listener, undisturbed, HALF)
    assert_identical(weights(tmp_path, "run"), weights(undisturbed[0], "run"))


class Outage(MemoryFileSystem):
    """Remote storage that refuses what `refuses` names, a number of times."""

    protocol = "outage"
    store, pseudo_dirs = {}, [""]
    refuses, times = "", 0

    def _perhaps(self, path):
        if Outage.times and Outage.refuses in str(path):
            Outage.times -= 1
            raise OSError("503 Slow Down")

    def put_file(self, lpath, rpath, **options):
        self._perhaps(rpath)
        return super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, **options):
        self._perhaps(path)
        return super().pipe_file(path, value, **options)

    def cat_file(self, path, start=None, end=None, **options):
        self._perhaps(path)
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def outage(tmp_path):
    """Where storage is that fails when it is told to."""
    fsspec.register_implementation("outage", Outage, clobber=True)
    Outage.times = 0
    return f"outage://{tmp_path.name}"


@pytest.mark.parametrize("refused", ["optim_states.pt", "step-0000002/checkpoint.json", "model.safetensors"])
def test_storage_that_fails_for_a_while_is_waited_for_and_the_run_goes_on(photo_shards, outage, undisturbed, refused):
    Outage.refuses, Outage.times = refused, 2
    listener = Listener()
    result = run(small_job(photo_shards, outage, AT_HALF), in_this_process(listener))
    assert result.finished
    assert Outage.times == 0
    told = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert len(told) == 2
    assert all(refused in text and "503 Slow Down; trying again" in text for text in told)
    assert_same_steps(listener, undisturbed)
    assert list_checkpoints(outage) == [f"step-{HALF:07d}", f"step-{STEPS:07d}"]


def test_storage_that_stays_away_ends_the_run_and_says_so(photo_shards, outage):
    Outage.refuses, Outage.times = "optim_states.pt", 10**6
    with pytest.raises(
        RuntimeError, match=r"worker 0 cannot write the checkpoint of step 2: cannot write outage:.*503"
    ):
        run(small_job(photo_shards, outage, [*AT_HALF, "training.storage_patience=0.1"]), in_this_process(Listener()))
    assert list_checkpoints(outage) == []


def test_a_checkpoint_that_cannot_be_reached_is_not_taken_for_a_damaged_one(photo_shards, outage):
    job = small_job(photo_shards, outage, EVERY_STEP)
    run(job, in_this_process(Listener(HALF)))
    Outage.refuses, Outage.times = f"step-{HALF:07d}/checkpoint.json", 2
    listener = Listener()
    run(job, in_this_process(listener))
    told = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert len(told) == 2
    assert not any("damaged" in text for text in told)
    assert listener.training[0]["step"] == HALF + 1


def test_samples_are_asked_for_again_and_not_called_damaged(photo_shards, outage, tmp_path, undisturbed):
    for name in os.listdir(photo_shards):
        storage.upload(f"{photo_shards}/{name}", f"{outage}/shards/{name}")

    class Breaker(Listener):
        def record(self, record):
            super().record(record)
            if record["kind"] == "start":
                # More than the first tries of all chunks read ahead, so the one that is trained on is among them.
                Outage.refuses, Outage.times = "shard-", 2000

    listener = Breaker()
    result = run(small_job(f"{outage}/shards", tmp_path / "run"), in_this_process(listener))
    assert Outage.times == 0
    assert not result.damaged
    assert_same_steps(listener, undisturbed)
    told = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert told
    assert all("503 Slow Down; trying again" in text for text in told)


def test_one_worker_that_cannot_write_ends_the_run_for_all(photo_shards, tmp_path):
    with pytest.raises(AssertionError, match="worker 1 cannot write the checkpoint of step 2"):
        in_group(2, train_with_a_full_disk, photo_shards, tmp_path)


def train_with_a_full_disk(rank, world, shards, out):
    def full(local, url):
        raise storage.StorageUnavailableError(f"cannot write {url}: No space left on device")

    if rank == 1:
        storage.upload = full
    return train_several(rank, world, shards, out, {"run": [*AT_HALF, "training.storage_patience=0"]})


def failing(error):
    def fail(path):
        raise error

    return fail


def onto_a_full_disk(path):
    path.symlink_to("/dev/full")
    pickled({"weights": torch.zeros(100_000)})(path)


def written_aside(out, write):
    """Has a checkpoint written one of whose files is written by `write`."""
    writer = CheckpointWriter(str(out), in_this_process(Listener()), 1, 0.0, print)
    writer.save(Progress(3, 48, 1.0, 1, "", ""), {"state/weights": write})
    writer.finish()


@pytest.mark.parametrize(
    "write",
    [
        onto_a_full_disk,
        failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        failing(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))),
        failing(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ],
    ids=["torch", "system", "quota", "safetensors"],
)
def test_a_full_scratch_disk_is_named_with_what_to_do(tmp_path, write):
    told = (
        r"worker 0 cannot write the checkpoint of step 3: state/weights cannot be written to the scratch folder "
        rf"{tempfile.gettempdir()}/\w+, where \d+ MB are free \(.+\); make room there, or set TMPDIR"
    )
    with pytest.raises(RuntimeError, match=told):
        written_aside(tmp_path, write)


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
def test_what_else_fails_while_a_checkpoint_is_written_aside_says_so_itself(tmp_path, error, message):
    with pytest.raises(RuntimeError, match=f"^worker 0 cannot write the checkpoint of step 3: {message}$"):
        written_aside(tmp_path, failing(error))
