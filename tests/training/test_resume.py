"""A run that is interrupted and goes on is the run that was never interrupted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from process_group import in_group
from small_runs import STEPS, Listener, in_this_process, small_job, train_several
from test_engine import ENGINES, UNCOMPARED

from bsq_ray import storage
from bsq_ray.training.checkpoints.writer import list_checkpoints, newest_progress
from bsq_ray.training.trainer import run

EVERY_STEP = ["training.checkpoint_every=1", "training.keep_checkpoints=3"]


def weights(out, name):
    folder = Path(out) / name / "model"
    return {path.name: safetensors.numpy.load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_identical(left, right):
    assert left.keys() == right.keys()
    for file in left:
        for key in left[file]:
            assert np.array_equal(left[file][key], right[file][key]), (file, key)


def numbers(record):
    return {key: value for key, value in record.items() if key not in UNCOMPARED}


HALF = STEPS // 2


@pytest.fixture(scope="module")
def stopped(photo_shards, tmp_path_factory):
    """(folder, losses): each engine's run on two workers, in one go as "… whole", and stopped at half."""
    out = str(tmp_path_factory.mktemp("stopped"))
    runs = {f"{name} whole": overrides for name, overrides in ENGINES.items()} | ENGINES
    [losses, _] = in_group(2, train_several, photo_shards, out, runs, dict.fromkeys(ENGINES, HALF))
    return out, losses


@pytest.fixture(scope="module")
def continued(stopped, photo_shards, tmp_path_factory):
    """(folder, losses): the stopped runs, continued by two new workers."""
    out = str(tmp_path_factory.mktemp("continued"))
    shutil.copytree(stopped[0], out, dirs_exist_ok=True)
    [losses, _] = in_group(2, train_several, photo_shards, out, ENGINES)
    return out, losses


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_continued_run_is_identical_to_the_last_bit(continued, stopped, engine):
    out, losses = continued
    expected = stopped[1][f"{engine} whole"]
    assert [record["step"] for record in losses[engine]] == [HALF + 1, STEPS]
    assert [numbers(r) for r in stopped[1][engine] + losses[engine]] == [numbers(r) for r in expected]
    assert_identical(weights(out, engine), weights(out, f"{engine} whole"))


@pytest.mark.parametrize(
    "engine",
    [
        *("ddp", "zero 1"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero 0", "zero 2", "zero 2 offloaded", "zero 3")),
    ],
)
def test_another_number_of_workers_goes_on_where_the_others_stopped(stopped, photo_shards, tmp_path, engine):
    out, losses = stopped
    shutil.copytree(f"{out}/{engine}", tmp_path / engine)
    alone = train_several(0, 1, photo_shards, tmp_path, {engine: ENGINES[engine]})[engine]
    for record, expected in zip(alone, losses[f"{engine} whole"][HALF:], strict=True):
        for key, value in numbers(expected).items():
            assert record[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


@pytest.fixture
def two_checkpoints(photo_shards, tmp_path):
    """Folder of a run of this process with a checkpoint after each of two steps."""
    run(small_job(photo_shards, tmp_path, EVERY_STEP), in_this_process(Listener(HALF)))
    assert list_checkpoints(str(tmp_path)) == ["step-0000001", "step-0000002"]
    return tmp_path


def damage_by_cutting(file):
    file.write_bytes(file.read_bytes()[:-1])


def damage_by_one_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [Path.unlink, damage_by_cutting, damage_by_one_bit])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(two_checkpoints, photo_shards, damage):
    newest = two_checkpoints / "checkpoints" / "step-0000002"
    [file] = newest.glob("generator/**/*optim_states.pt")
    damage(file)
    listener = Listener()
    run(small_job(photo_shards, two_checkpoints, EVERY_STEP), in_this_process(listener))
    [warning] = [record["text"] for record in listener.records if record["kind"] == "warning"]
    assert "step-0000002 is damaged and is passed over" in warning
    assert file.name in warning
    assert [record["step"] for record in listener.training] == [2, 3, 4]


def test_a_checkpoint_without_its_index_does_not_exist(two_checkpoints, photo_shards):
    (two_checkpoints / "checkpoints" / "step-0000002" / "checkpoint.json").unlink()
    assert list_checkpoints(str(two_checkpoints)) == ["step-0000001"]
    assert newest_progress(str(two_checkpoints)).step == 1


def test_the_newest_checkpoints_are_kept_and_leftovers_removed(two_checkpoints, photo_shards):
    (two_checkpoints / "checkpoints" / "step-0000001" / "checkpoint.json").unlink()
    run(
        small_job(photo_shards, two_checkpoints, [*EVERY_STEP, "training.keep_checkpoints=2"]),
        in_this_process(Listener()),
    )
    assert sorted(path.name for path in (two_checkpoints / "checkpoints").iterdir()) == ["step-0000003", "step-0000004"]


def test_a_damaged_newer_checkpoint_does_not_push_out_those_that_are_written_after_it(two_checkpoints, photo_shards):
    (two_checkpoints / "checkpoints" / "step-0000002").rename(two_checkpoints / "checkpoints" / "step-0000009")
    [file] = (two_checkpoints / "checkpoints" / "step-0000009").glob("generator/**/*optim_states.pt")
    file.unlink()
    job = small_job(photo_shards, two_checkpoints, [*EVERY_STEP, "training.keep_checkpoints=1"])
    run(job, in_this_process(Listener(HALF)))
    assert list_checkpoints(str(two_checkpoints)) == ["step-0000002"]


def test_without_a_whole_checkpoint_a_run_that_began_with_other_weights_does_not_begin_with_random_ones(
    two_checkpoints, photo_shards
):
    for file in two_checkpoints.glob("checkpoints/*/generator/**/*optim_states.pt"):
        file.unlink()
    with pytest.raises(ValueError, match="is whole, and the run began with other weights; remove its checkpoints"):
        run(small_job(photo_shards, two_checkpoints, init_url="a-model"), in_this_process(Listener()))


def test_another_model_cannot_go_on(two_checkpoints, photo_shards):
    job = small_job(photo_shards, two_checkpoints, ["model.encoder.layers=2", "training.batch_size=8"])
    with pytest.raises(
        ValueError, match="model.encoder.layers was 1 and is 2; training.batch_size was 16 and is 8; give the same"
    ):
        run(job, in_this_process(Listener()))


def test_a_run_can_go_on_for_longer_than_it_was_planned(two_checkpoints, photo_shards):
    listener = Listener()
    run(small_job(photo_shards, two_checkpoints, ["training.steps=5"]), in_this_process(listener))
    assert [record["step"] for record in listener.training] == [3, 4, 5]


def test_another_data_set_cannot_go_on(two_checkpoints, held_out_shards):
    with pytest.raises(ValueError, match="was trained on another data set"):
        run(small_job(held_out_shards, two_checkpoints), in_this_process(Listener()))


def test_a_finished_run_only_writes_its_model_again(two_checkpoints, photo_shards):
    job = small_job(photo_shards, two_checkpoints, EVERY_STEP)
    run(job, in_this_process(Listener()))
    before = weights(two_checkpoints.parent, two_checkpoints.name)
    listener = Listener()
    result = run(job, in_this_process(listener))
    assert result.finished
    assert result.figures
    assert not listener.training
    assert_identical(weights(two_checkpoints.parent, two_checkpoints.name), before)


def test_checkpoints_live_on_s3_too(photo_shards, bucket):
    overrides = [*ENGINES["ddp"], *EVERY_STEP]
    run(small_job(photo_shards, bucket, overrides), in_this_process(Listener(HALF)))
    listener = Listener()
    result = run(small_job(photo_shards, bucket, overrides), in_this_process(listener))
    assert result.finished
    assert [record["step"] for record in listener.training] == [3, 4]
    lines = storage.read_bytes(f"{bucket}/metrics.jsonl").decode().splitlines()
    assert [record["step"] for record in map(json.loads, lines) if record["kind"] == "training"] == [1, 2, 3, 4]
    assert storage.exists(f"{bucket}/model/model.safetensors")
    assert storage.exists(f"{bucket}/samples/step-0000004.png")
