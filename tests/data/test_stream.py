"""Batches: the same from either executor, for any number of workers, and full in spite of damage."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch

from bsq_ray import config
from bsq_ray.data.image_source import PhotoSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.stream import Damage, evaluation_batches, evaluation_blocks, evaluation_dataset, training_batches

SECTION = config.Data(crop_scale=(1.0, 1.5), flip=True, lanes=4, shuffle_window=8)


def batches(manifest, count, rank=0, world=1, position=0, executor="local", batch_size=8, section=SECTION, damage=None):
    stream = training_batches(
        PhotoSource(manifest, section, 32),
        section,
        batch_size,
        rank,
        world,
        seed=3,
        position=position,
        executor=executor,
        damage=damage,
    )
    return list(islice(stream, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.values_B, b.values_B)
        assert torch.equal(a.labels_B, b.labels_B)


@pytest.fixture(scope="module")
def manifest(photo_shards):
    return read_manifest(photo_shards)


def test_batches_are_uint8_crops(manifest):
    [batch] = batches(manifest, 1)
    assert batch.values_B.dtype == torch.uint8
    assert batch.values_B.shape == (8, 3, 32, 32)
    assert len(set(batch.keys)) == 8


def test_reading_begins_before_a_batch_is_asked_for(manifest, monkeypatch):
    began = threading.Event()
    read = PhotoSource.read
    monkeypatch.setattr(PhotoSource, "read", lambda *arguments: began.set() or read(*arguments))
    stream = training_batches(PhotoSource(manifest, SECTION, 32), SECTION, 8, 0, 1, seed=3)
    assert began.wait(30)
    assert_equal([next(stream)], batches(manifest, 1))


def test_ray_data_delivers_the_same_batches_as_threads(manifest, ray_local):
    assert_equal(batches(manifest, 40, executor="ray"), batches(manifest, 40))


def test_two_workers_share_what_one_worker_gets(manifest):
    whole = batches(manifest, 6)
    parts = [batches(manifest, 6, rank, 2) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.keys[0::2] == first.keys
        assert batch.keys[1::2] == second.keys
        assert torch.equal(batch.values_B[1::2], second.values_B)


def test_a_resumed_stream_goes_on_with_the_next_sample_for_another_number_of_workers_too(manifest):
    whole = batches(manifest, 10)
    assert_equal(whole[4:], batches(manifest, 6, position=4 * 8))
    resumed = [batches(manifest, 6, rank, 4, position=4 * 8) for rank in range(4)]
    for step, batch in enumerate(whole[4:]):
        assert sorted(batch.keys) == sorted(key for part in resumed for key in part[step].keys)


def test_over_an_epoch_every_key_is_seen_once(manifest):
    steps = manifest.samples // 8
    seen = [key for batch in batches(manifest, steps) for key in batch.keys]
    assert len(seen) == len(set(seen))


def test_options_of_the_section_change_the_crops(manifest):
    default = batches(manifest, 1)[0]
    for change in ({"crop_scale": (1.0, 1.0)}, {"flip": False}, {"lanes": 3}, {"shuffle_window": 2}):
        changed = batches(manifest, 1, section=SECTION.model_copy(update=change))[0]
        assert not torch.equal(default.values_B, changed.values_B), change


def test_prefetching_changes_nothing_but_time(manifest):
    eager = SECTION.model_copy(update={"prefetch_batches": 50})
    assert_equal(batches(manifest, 5, section=eager), batches(manifest, 5))


@pytest.fixture
def damaged_manifest(photo_folders, tmp_path):
    """A data set of which one sample's bytes were overwritten after packing."""
    from bsq_ray.data.pack import pack_images

    manifest = pack_images(str(photo_folders[1]), str(tmp_path), max_side=96, workers=0).manifest
    shard = manifest.shards[0]
    path = tmp_path / shard.name
    content = bytearray(path.read_bytes())
    content[shard.offsets[2] : shard.offsets[2] + shard.sizes[2]] = bytes(shard.sizes[2])
    path.write_bytes(content)
    return manifest


def test_a_damaged_sample_is_replaced_counted_and_named(damaged_manifest):
    damage = Damage(limit=10)
    steps = damaged_manifest.samples // 4
    seen = batches(damaged_manifest, steps, batch_size=4, damage=damage)
    bad = damaged_manifest.shards[0].keys[2]
    assert all(len(batch.keys) == 4 and bad not in batch.keys for batch in seen)
    [line] = damage.found
    assert bad in line
    assert "shard-000000.tar" in line


def test_too_much_damage_stops_and_says_which(damaged_manifest):
    section = SECTION.model_copy(update={"max_damaged": 0})
    with pytest.raises(RuntimeError, match=r"data.max_damaged = 0; the last one: shard-000000.tar"):
        batches(damaged_manifest, 10, batch_size=4, section=section)


def test_a_truncated_shard_is_noticed(damaged_manifest, tmp_path):
    path = tmp_path / damaged_manifest.shards[0].name
    path.write_bytes(path.read_bytes()[:50000])
    with pytest.raises(RuntimeError, match="the shard ends after"):
        batches(damaged_manifest, 10, batch_size=4, section=SECTION.model_copy(update={"max_damaged": 0}))


def test_evaluation_sees_every_sample_once(manifest):
    keys = [key for batch in evaluation_batches(PhotoSource(manifest, SECTION, 32), 5) for key in batch.keys]
    assert keys == [key for shard in manifest.shards for key in shard.keys]
    limited = [
        key for batch in evaluation_batches(PhotoSource(manifest, SECTION, 32), 5, limit=7) for key in batch.keys
    ]
    assert limited == keys[:7]


def test_ray_data_reads_what_threads_read(manifest, ray_local):
    here = list(evaluation_blocks(PhotoSource(manifest, SECTION, 32), 5))
    there = [row["block"] for row in evaluation_dataset(PhotoSource(manifest, SECTION, 32), 5).iter_rows()]
    assert [block.keys for block in there] == [block.keys for block in here]
    assert all(np.array_equal(a.values_P, b.values_P) for a, b in zip(here, there, strict=True))


def test_evaluation_tolerates_no_damage_unless_told(damaged_manifest):
    with pytest.raises(RuntimeError, match="damaged"):
        list(evaluation_batches(PhotoSource(damaged_manifest, SECTION, 32), 4))
    damage = Damage(limit=1)
    keys = [k for b in evaluation_batches(PhotoSource(damaged_manifest, SECTION, 32), 4, damage=damage) for k in b.keys]
    assert len(keys) == damaged_manifest.samples - 1


def test_training_streams_from_an_object_store(photo_folders, bucket):
    from bsq_ray.data.pack import pack_images

    manifest = pack_images(str(photo_folders[1]), f"{bucket}/set", max_side=96, workers=0).manifest
    assert np.all([len(batch.keys) == 8 for batch in batches(manifest, 3)])


def without_members_of(path, key):
    """Writes a shard anew without the members of a sample, as a careless tool leaves it."""
    import io
    import tarfile

    kept = io.BytesIO()
    with tarfile.open(path) as source, tarfile.open(fileobj=kept, mode="w") as target:
        for member in source.getmembers():
            if not member.name.startswith(f"{key}."):
                target.addfile(member, source.extractfile(member))
    path.write_bytes(kept.getvalue())


def test_what_follows_a_missing_member_is_named_and_left_out(damaged_manifest, tmp_path):
    shard = damaged_manifest.shards[0]
    without_members_of(tmp_path / shard.name, shard.keys[4])
    damage = Damage(limit=100)
    steps = damaged_manifest.samples // 4
    seen = {key for batch in batches(damaged_manifest, steps, batch_size=4, damage=damage) for key in batch.keys}
    lost = {line.split(": ")[1] for line in damage.found}
    assert lost == set(shard.keys[4:]) | {shard.keys[2]}
    assert not lost & seen
    with pytest.raises(RuntimeError, match=f"data.max_damaged = 1; the last one: {shard.name}"):
        batches(damaged_manifest, 10, batch_size=4, section=SECTION.model_copy(update={"max_damaged": 1}))
