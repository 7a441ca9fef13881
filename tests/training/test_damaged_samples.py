"""Damaged samples in a run of two workers: skipped, counted over both, named in log and summary, up to a limit."""

import json

import pytest
from process_group import in_group
from small_runs import PRESET, SMALL, Listener, small_job

from bsq_ray.config import load_config
from bsq_ray.data import stream
from bsq_ray.data.pack import pack_images
from bsq_ray.training.launch import train
from bsq_ray.training.trainer import run
from bsq_ray.training.worker_context import Worker, local_device

# Two passes over the photographs, so that every sample is met.
OVERRIDES = ["training.steps=12", "data.lanes=1", "loss.adversarial.weight=0"]


@pytest.fixture
def damaged(photo_folders, tmp_path):
    """(URL, names) of shards in which every seventh photograph is broken."""
    shards, names = tmp_path / "shards", []
    manifest = pack_images(str(photo_folders[0]), str(shards), max_side=64, num_workers=0).manifest
    for number in range(0, manifest.num_samples, 7):
        shard, index = manifest.locate(number)
        content = bytearray((shards / shard.name).read_bytes())
        content[shard.offsets[index] : shard.offsets[index] + 64] = bytes(64)
        (shards / shard.name).write_bytes(content)
        names.append((shard.name, shard.keys[index]))
    return str(shards), names


def of_two(rank, world, shards, out, overrides):
    """(records, all samples that the result names) of a worker that reads one step at a time; or its error."""
    stream._CHUNK_SAMPLES = 1
    listener = Listener()
    job = small_job(shards, out, [*OVERRIDES, *overrides])
    try:
        result = run(job, Worker(rank, world, local_device("cpu"), "local", listener))
    except RuntimeError as error:
        return str(error)
    return listener.records, result.damaged


def test_both_workers_samples_are_named_in_the_log_and_in_the_result(damaged, tmp_path):
    shards, names = damaged
    [(records, first), (_, second)] = in_group(2, of_two, shards, tmp_path / "run", [])
    assert sorted(first) == sorted(second)
    assert {tuple(line.split(": ")[:2]) for line in first} == set(names)
    told = [sample for record in records if record["kind"] == "damaged" for sample in record["samples"]]
    assert sorted(told) == sorted(first)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if line["kind"] == "damaged"]


def test_the_limit_holds_for_all_workers_together(damaged, tmp_path):
    shards, names = damaged
    limit = len(names) - 1
    # In so few steps neither of them meets all.
    few = ["training.steps=3", f"data.max_damaged={limit}"]
    for error in in_group(2, of_two, shards, tmp_path / "run", few):
        assert f"{len(names)} damaged samples are more than data.max_damaged = {limit}; the last one: shard-" in error


def test_the_summary_counts_and_names_them(damaged, tmp_path):
    shards, names = damaged
    result = train(
        load_config(PRESET, [*SMALL, *OVERRIDES]),
        shards,
        str(tmp_path / "run"),
        0,
        show=lambda record: None,
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {tuple(line.split(": ")[:2]) for line in summary["damaged"]} == set(names)
    assert result.damaged == summary["damaged"]


def test_held_out_shards_that_are_gone_are_named_with_the_cause(photo_shards, photo_folders, tmp_path):
    held_out = tmp_path / "held-out"
    pack_images(str(photo_folders[1]), str(held_out), max_side=64, num_workers=0)
    for tar in held_out.glob("*.tar"):
        tar.unlink()
    with pytest.raises(ValueError, match=r"held-out has no readable image to evaluate on: shard-\d+\.tar"):
        train(
            load_config(PRESET, [*SMALL, *OVERRIDES]),
            photo_shards,
            str(tmp_path / "run"),
            workers=0,
            held_out_url=str(held_out),
            show=lambda record: None,
        )
