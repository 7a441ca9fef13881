"""Resumed runs are identical to uninterrupted ones."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from process_group import spawn_group
from small_runs import STEPS, RecordingReporter, local_worker, small_spec, train_runs
from test_engine import ENGINES, UNCOMPARED

from bsq_ray import storage
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import NodeFolder, WorkerContext

EVERY_STEP = ["training.checkpoint_every=1", "training.keep_checkpoints=3"]


def load_weights(out, name):
    folder = Path(out) / name / "model"
    return {path.name: safetensors.numpy.load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_identical(left, right):
    assert left.keys() == right.keys()
    for file in left:
        for key in left[file]:
            assert np.array_equal(left[file][key], right[file][key]), (file, key)


def comparable_values(record):
    return {key: value for key, value in record.items() if key not in UNCOMPARED}


def assert_same_losses(records, expected_records, tolerance):
    """The records have the same steps and values, within a relative and absolute tolerance."""
    for record, expected in zip(records, expected_records, strict=True):
        for key, value in comparable_values(expected).items():
            assert record[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


HALF = STEPS // 2


@pytest.fixture(scope="module")
def stopped_runs(photo_shards, tmp_path_factory):
    """(folder, losses): each engine's run on two workers, uninterrupted as "… uninterrupted", and stopped at half."""
    out = str(tmp_path_factory.mktemp("stopped"))
    runs = {f"{name} uninterrupted": overrides for name, overrides in ENGINES.items()} | ENGINES
    [losses, _] = spawn_group(2, train_runs, photo_shards, out, runs, dict.fromkeys(ENGINES, HALF))
    return out, losses


@pytest.fixture(scope="module")
def resumed_runs(stopped_runs, photo_shards, tmp_path_factory):
    """(folder, losses): the stopped runs, resumed by two new workers."""
    out = str(tmp_path_factory.mktemp("continued"))
    shutil.copytree(stopped_runs[0], out, dirs_exist_ok=True)
    [losses, _] = spawn_group(2, train_runs, photo_shards, out, ENGINES)
    return out, losses


@pytest.mark.parametrize("engine", list(ENGINES))
def test_resumed_run_is_bit_identical(resumed_runs, stopped_runs, engine):
    out, losses = resumed_runs
    expected = stopped_runs[1][f"{engine} uninterrupted"]
    assert [record["step"] for record in losses[engine]] == [HALF + 1, STEPS]
    assert [comparable_values(r) for r in stopped_runs[1][engine] + losses[engine]] == [
        comparable_values(r) for r in expected
    ]
    assert_identical(load_weights(out, engine), load_weights(out, f"{engine} uninterrupted"))


@pytest.mark.parametrize(
    "engine",
    [
        *("ddp", "zero 1"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero 2 offloaded", "zero 3")),
        *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in ("zero 0", "zero 2")),
    ],
)
def test_resume_with_other_world_size_matches(stopped_runs, photo_shards, tmp_path, engine):
    """A run resumed by another number of workers continues with the same losses."""
    out, losses = stopped_runs
    shutil.copytree(f"{out}/{engine}", tmp_path / engine)
    alone = train_runs(0, 1, photo_shards, tmp_path, {engine: ENGINES[engine]})[engine]
    assert_same_losses(alone, losses[f"{engine} uninterrupted"][HALF:], 1e-5)


def resume_on_own_nodes(rank, world_size, shards, out, runs):
    """Resume runs with each worker on a node of its own.

    Returns:
        by run, the bytes of each downloaded file by name, the steps, and the warnings.
    """

    @contextmanager
    def own_folder(worker):
        with tempfile.TemporaryDirectory() as folder:
            yield NodeFolder(Path(folder), [worker.rank])
            worker.barrier()

    downloads = {}
    download = storage.download

    def counted(url, path):
        download(url, path)
        downloads[url.partition("/checkpoints/")[2]] = Path(path).stat().st_size

    WorkerContext.node_local_dir, storage.download = own_folder, counted
    results = {}
    for name, overrides in runs.items():
        downloads.clear()
        reporter = RecordingReporter()
        worker = WorkerContext(rank, world_size, torch.device("cpu"), "local", reporter)
        run_training(small_spec(shards, f"{out}/{name}", overrides), worker)
        warnings = [record["text"] for record in reporter.records if record["kind"] == "warning"]
        results[name] = dict(downloads), [record["step"] for record in reporter.training_records], warnings
    return results


@pytest.fixture(scope="module")
def separate_nodes(stopped_runs, photo_shards, tmp_path_factory):
    """(files of the checkpoint, downloads of each node), by engine."""
    out = tmp_path_factory.mktemp("nodes")
    for engine in SEPARATED:
        shutil.copytree(f"{stopped_runs[0]}/{engine}", out / engine)
    folders = {engine: out / engine / "checkpoints" for engine in SEPARATED}
    files = {
        engine: {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*.*")}
        for engine, folder in folders.items()
    }
    runs = {engine: ENGINES[engine] for engine in SEPARATED}
    by_rank = spawn_group(2, resume_on_own_nodes, photo_shards, str(out), runs)
    return {engine: (files[engine], [results[engine][0] for results in by_rank]) for engine in SEPARATED}


SEPARATED = ["zero 1", "zero 3"]


@pytest.mark.parametrize("engine", SEPARATED)
def test_resume_downloads_only_files_of_own_ranks(separate_nodes, engine):
    """Each of two nodes downloads the files that both need and those of its own rank, and both together all of them."""
    files, downloads = separate_nodes[engine]
    files = {name: size for name, size in files.items() if not name.endswith("checkpoint.json")}
    of_rank = [{name for name in files if f"rank_{rank}_" in name or f"rng-{rank}" in name} for rank in range(2)]
    assert all(of_rank)
    for rank in range(2):
        assert downloads[rank] == {name: size for name, size in files.items() if name not in of_rank[1 - rank]}
    if engine == "zero 3":
        # Weights and optimizer states are divided, so a node downloads little more than half of the checkpoint.
        assert sum(downloads[0].values()) < 0.7 * sum(files.values())


@pytest.mark.slow
def test_resume_skips_checkpoint_that_one_node_finds_damaged(photo_shards, tmp_path):
    """A node whose own files are intact skips the checkpoint too."""
    [_, _] = spawn_group(
        2, train_runs, photo_shards, str(tmp_path), {"run": [*ENGINES["zero 1"], *EVERY_STEP]}, {"run": HALF}
    )
    [file] = (tmp_path / "run" / "checkpoints" / f"step-{HALF:07d}").glob("generator/**/*_rank_1_*")
    flip_one_bit(file)
    results = spawn_group(
        2, resume_on_own_nodes, photo_shards, str(tmp_path), {"run": [*ENGINES["zero 1"], *EVERY_STEP]}
    )
    _, steps, [warning] = results[0]["run"]
    assert steps == list(range(HALF, STEPS + 1))
    assert f"step-{HALF:07d} is damaged and is skipped" in warning


@pytest.fixture
def two_checkpoints(photo_shards, tmp_path):
    """Folder of a run with a checkpoint after each of two steps."""
    run_training(small_spec(photo_shards, tmp_path, EVERY_STEP), local_worker(RecordingReporter(HALF)))
    assert list_checkpoints(str(tmp_path)) == ["step-0000001", "step-0000002"]
    return tmp_path


def truncate_file(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_one_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [Path.unlink, truncate_file, flip_one_bit])
def test_damaged_checkpoint_is_skipped_with_warning(two_checkpoints, photo_shards, damage):
    newest = two_checkpoints / "checkpoints" / "step-0000002"
    [file] = newest.glob("generator/**/*optim_states.pt")
    damage(file)
    listener = RecordingReporter()
    run_training(small_spec(photo_shards, two_checkpoints, EVERY_STEP), local_worker(listener))
    [warning] = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert "step-0000002 is damaged and is skipped" in warning
    assert file.name in warning
    assert [record["step"] for record in listener.training_records] == [2, 3, 4]


def test_checkpoint_without_index_is_invisible(two_checkpoints, photo_shards):
    """A checkpoint without its index file is not listed."""
    (two_checkpoints / "checkpoints" / "step-0000002" / "checkpoint.json").unlink()
    assert list_checkpoints(str(two_checkpoints)) == ["step-0000001"]
    assert newest_progress(str(two_checkpoints)).step == 1


def test_old_and_partial_checkpoints_are_removed(two_checkpoints, photo_shards):
    """The newest checkpoints are kept; older and partial ones are removed."""
    (two_checkpoints / "checkpoints" / "step-0000001" / "checkpoint.json").unlink()
    run_training(
        small_spec(photo_shards, two_checkpoints, [*EVERY_STEP, "training.keep_checkpoints=2"]),
        local_worker(RecordingReporter()),
    )
    assert sorted(path.name for path in (two_checkpoints / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]


def test_damaged_newer_checkpoint_keeps_later_ones(two_checkpoints, photo_shards):
    """A damaged checkpoint with a higher step does not displace checkpoints written after it."""
    (two_checkpoints / "checkpoints" / "step-0000002").rename(two_checkpoints / "checkpoints" / "step-0000009")
    [file] = (two_checkpoints / "checkpoints" / "step-0000009").glob("generator/**/*optim_states.pt")
    file.unlink()
    job = small_spec(photo_shards, two_checkpoints, [*EVERY_STEP, "training.keep_checkpoints=1"])
    run_training(job, local_worker(RecordingReporter(HALF)))
    assert list_checkpoints(str(two_checkpoints)) == ["step-0000002"]


def test_resume_initialized_run_never_uses_random_weights(two_checkpoints, photo_shards):
    """Without an intact checkpoint a run that was initialized from a model fails instead of starting from random
    weights.
    """
    for file in two_checkpoints.glob("checkpoints/*/generator/**/*optim_states.pt"):
        file.unlink()
    with pytest.raises(ValueError, match="is intact, and the run started with other weights; remove its checkpoints"):
        run_training(small_spec(photo_shards, two_checkpoints, init_url="a-model"), local_worker(RecordingReporter()))


def test_resume_other_model_raises(two_checkpoints, photo_shards):
    """A run cannot resume with another model configuration."""
    job = small_spec(photo_shards, two_checkpoints, ["model.encoder.layers=2", "training.batch_size=8"])
    with pytest.raises(
        ValueError, match="model.encoder.layers was 1 and is 2; training.batch_size was 16 and is 8; use the same"
    ):
        run_training(job, local_worker(RecordingReporter()))


def test_resume_with_more_steps_extends_run(two_checkpoints, photo_shards):
    """A finished or stopped run can be extended with more steps."""
    listener = RecordingReporter()
    run_training(small_spec(photo_shards, two_checkpoints, ["training.steps=5"]), local_worker(listener))
    assert [record["step"] for record in listener.training_records] == [3, 4, 5]


def test_resume_other_dataset_raises(two_checkpoints, held_out_shards):
    """A run cannot resume on another data set."""
    with pytest.raises(ValueError, match="was trained on another data set"):
        run_training(small_spec(held_out_shards, two_checkpoints), local_worker(RecordingReporter()))


def test_resume_finished_run_only_rewrites_model(two_checkpoints, photo_shards):
    """Resuming a finished run takes no step and writes the same model again."""
    job = small_spec(photo_shards, two_checkpoints, EVERY_STEP)
    run_training(job, local_worker(RecordingReporter()))
    before = load_weights(two_checkpoints.parent, two_checkpoints.name)
    listener = RecordingReporter()
    result = run_training(job, local_worker(listener))
    assert result.is_finished
    assert result.metrics
    assert not listener.training_records
    assert_identical(load_weights(two_checkpoints.parent, two_checkpoints.name), before)


def test_checkpoints_on_s3_resume(photo_shards, bucket):
    """A run on S3 saves checkpoints, logs and model there and resumes."""
    overrides = [*ENGINES["ddp"], *EVERY_STEP]
    run_training(small_spec(photo_shards, bucket, overrides), local_worker(RecordingReporter(HALF)))
    listener = RecordingReporter()
    result = run_training(small_spec(photo_shards, bucket, overrides), local_worker(listener))
    assert result.is_finished
    assert [record["step"] for record in listener.training_records] == [3, 4]
    lines = storage.read_bytes(f"{bucket}/metrics.jsonl").decode().splitlines()
    assert [record["step"] for record in map(json.loads, lines) if record["kind"] == "training"] == [1, 2, 3, 4]
    assert storage.exists(f"{bucket}/model/model.safetensors")
    assert storage.exists(f"{bucket}/samples/step-0000004.png")
