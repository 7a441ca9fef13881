"""Damaged samples: skipped, counted over all workers, reported in log and summary, and limited in number."""

import json

import pytest
from process_group import spawn_group
from small_runs import PRESET, SMALL, RecordingReporter, small_spec

from bsq_ray.config import load_config
from bsq_ray.data import stream
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.training.launch import train
from bsq_ray.training.trainer import run_training
from bsq_ray.training.worker_context import WorkerContext, local_device

# Two epochs, so that every sample is read.
OVERRIDES = ["training.steps=12", "data.interleave=1", "loss.adversarial.weight=0"]


@pytest.fixture
def damaged_shards(photo_folders, tmp_path):
    """(URL, names) of shards in which every seventh image is damaged."""
    shards, names = tmp_path / "shards", []
    manifest = pack_images(str(photo_folders[0]), str(shards), PackOptions(max_side=64, num_workers=0)).manifest
    for number in range(0, manifest.num_samples, 7):
        shard, index = manifest.locate(number)
        content = bytearray((shards / shard.name).read_bytes())
        content[shard.entry(index).offset : shard.entry(index).offset + 64] = bytes(64)
        (shards / shard.name).write_bytes(content)
        names.append((shard.name, shard.keys[index]))
    return str(shards), names


def train_worker(rank, world_size, shards, out, overrides):
    """(records, skipped samples of the result) of a worker that reads one step at a time; or its error message."""
    stream._CHUNK_SAMPLES = 1
    listener = RecordingReporter()
    job = small_spec(shards, out, [*OVERRIDES, *overrides])
    try:
        result = run_training(job, WorkerContext(rank, world_size, local_device("cpu"), "local", listener))
    except RuntimeError as error:
        return str(error)
    return listener.records, result.skipped_samples


def test_skipped_samples_of_all_workers_are_reported(damaged_shards, tmp_path):
    """Samples skipped by either worker are named in the log and in the result."""
    shards, names = damaged_shards
    [(records, first), (_, second)] = spawn_group(2, train_worker, shards, tmp_path / "run", [])
    assert sorted(first) == sorted(second)
    assert {tuple(line.split(": ")[:2]) for line in first} == set(names)
    logged = [sample for record in records if record["kind"] == "skipped_samples" for sample in record["samples"]]
    assert sorted(logged) == sorted(first)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if line["kind"] == "skipped_samples"]


def test_max_skipped_samples_applies_to_all_workers(damaged_shards, tmp_path):
    """The limit applies to the skipped samples of all workers together."""
    shards, names = damaged_shards
    limit = len(names) - 1
    # In so few steps no worker reads all of them.
    few = ["training.steps=3", f"data.max_skipped_samples={limit}"]
    for error in spawn_group(2, train_worker, shards, tmp_path / "run", few):
        assert (
            f"{len(names)} damaged samples are more than data.max_skipped_samples = {limit}; the last one: shard-"
            in error
        )


def test_summary_lists_skipped_samples(damaged_shards, tmp_path):
    """The summary names all skipped samples."""
    shards, names = damaged_shards
    result = train(
        load_config(PRESET, [*SMALL, *OVERRIDES]),
        shards,
        str(tmp_path / "run"),
        0,
        on_record=lambda record: None,
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {tuple(line.split(": ")[:2]) for line in summary["skipped_samples"]} == set(names)
    assert result.skipped_samples == summary["skipped_samples"]


def test_eval_missing_shards_raises_with_cause(photo_shards, photo_folders, tmp_path):
    """If no held-out image is readable, the error names the source and the first cause."""
    held_out = tmp_path / "held-out"
    pack_images(str(photo_folders[1]), str(held_out), PackOptions(max_side=64, num_workers=0))
    for tar in held_out.glob("*.tar"):
        tar.unlink()
    with pytest.raises(ValueError, match=r"held-out has no readable image to evaluate on: shard-\d+\.tar"):
        train(
            load_config(PRESET, [*SMALL, *OVERRIDES]),
            photo_shards,
            str(tmp_path / "run"),
            num_workers=0,
            held_out_url=str(held_out),
            on_record=lambda record: None,
        )
