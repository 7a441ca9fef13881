"""Batches: the same from both executors, for any number of workers, and full despite damaged samples."""

import shutil
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from bsq_ray import config
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.stream import (
    SkippedSamples,
    evaluation_batches,
    evaluation_blocks,
    evaluation_dataset,
    training_batches,
)

DATA_CONFIG = config.DataConfig(resize_range=(1.0, 1.5), random_flip=True, interleave=4, shuffle_block_size=8)


def batches(
    manifest,
    count,
    rank=0,
    world_size=1,
    position=0,
    executor="local",
    batch_size=8,
    data_config=DATA_CONFIG,
    skipped=None,
):
    stream = training_batches(
        ImageSource(manifest, data_config, 32),
        data_config,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=3,
        position=position,
        executor=executor,
        skipped=skipped,
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


def test_training_batches_prefetch_the_first_batch(manifest, monkeypatch):
    """Reading starts before the first batch is requested."""
    started = threading.Event()
    read = ImageSource.read
    monkeypatch.setattr(ImageSource, "read", lambda *arguments: started.set() or read(*arguments))
    stream = training_batches(
        ImageSource(manifest, DATA_CONFIG, 32), DATA_CONFIG, batch_size=8, rank=0, world_size=1, seed=3
    )
    assert started.wait(30)
    assert_equal([next(stream)], batches(manifest, 1))


def test_training_batches_ray_equals_local(manifest, ray_local):
    """Ray Data delivers the same batches as threads."""
    assert_equal(batches(manifest, 40, executor="ray"), batches(manifest, 40))


def test_training_batches_two_workers_split_each_batch(manifest):
    """Two workers split the batches that a single worker reads."""
    whole = batches(manifest, 6)
    parts = [batches(manifest, 6, rank, 2) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.keys[0::2] == first.keys
        assert batch.keys[1::2] == second.keys
        assert torch.equal(batch.values_B[1::2], second.values_B)


def test_training_batches_resume_at_other_world_size(manifest):
    """A resumed stream continues with the next sample, for any number of workers."""
    whole = batches(manifest, 10)
    assert_equal(whole[4:], batches(manifest, 6, position=4 * 8))
    resumed = [batches(manifest, 6, rank, 4, position=4 * 8) for rank in range(4)]
    for step, batch in enumerate(whole[4:]):
        assert sorted(batch.keys) == sorted(key for part in resumed for key in part[step].keys)


def test_training_batches_epoch_has_each_key_once(manifest):
    """No key repeats within an epoch."""
    steps = manifest.num_samples // 8
    keys = [key for batch in batches(manifest, steps) for key in batch.keys]
    assert len(keys) == len(set(keys))


def test_training_batches_follow_data_config(manifest):
    """Each option of the data configuration changes the batches."""
    default = batches(manifest, 1)[0]
    for change in ({"resize_range": (1.0, 1.0)}, {"random_flip": False}, {"interleave": 3}, {"shuffle_block_size": 2}):
        changed = batches(manifest, 1, data_config=DATA_CONFIG.model_copy(update=change))[0]
        assert not torch.equal(default.values_B, changed.values_B), change


def test_training_batches_are_independent_of_prefetch(manifest):
    """The prefetch depth does not change the batches."""
    eager = DATA_CONFIG.model_copy(update={"prefetch_batches": 50})
    assert_equal(batches(manifest, 5, data_config=eager), batches(manifest, 5))


@pytest.fixture
def damaged_manifest(photo_folders, tmp_path):
    """A data set of which one sample's bytes were overwritten after packing."""
    from bsq_ray.data.pack import PackOptions, pack_images

    manifest = pack_images(str(photo_folders[1]), str(tmp_path), PackOptions(max_side=96, num_workers=0)).manifest
    shard = manifest.shards[0]
    path = tmp_path / shard.name
    content = bytearray(path.read_bytes())
    content[shard.entry(2).offset : shard.entry(2).offset + shard.entry(2).size] = bytes(shard.entry(2).size)
    path.write_bytes(content)
    return manifest


def test_training_batches_damaged_sample_is_replaced(damaged_manifest):
    """A damaged sample is replaced, counted once and reported by key and shard."""
    skipped = SkippedSamples(limit=10)
    steps = damaged_manifest.num_samples // 4
    delivered = batches(damaged_manifest, steps, batch_size=4, skipped=skipped)
    bad = damaged_manifest.shards[0].keys[2]
    assert all(len(batch.keys) == 4 and bad not in batch.keys for batch in delivered)
    [line] = skipped.samples
    assert bad in line
    assert "shard-000000.tar" in line


def test_training_batches_too_many_skipped_raises(damaged_manifest):
    """More skipped samples than allowed raise an error that names the last one."""
    data_config = DATA_CONFIG.model_copy(update={"max_skipped_samples": 0})
    with pytest.raises(RuntimeError, match=r"data.max_skipped_samples = 0; the last one: shard-000000.tar"):
        batches(damaged_manifest, 10, batch_size=4, data_config=data_config)


def test_training_batches_truncated_shard_raises(manifest, tmp_path):
    """A truncated shard is detected."""
    shutil.copytree(manifest.url, tmp_path / "shards")
    path = tmp_path / "shards" / manifest.shards[0].name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data_config = DATA_CONFIG.model_copy(update={"max_skipped_samples": 0})
    with pytest.raises(RuntimeError, match="the shard ends after"):
        batches(read_manifest(str(tmp_path / "shards")), 10, data_config=data_config)


def test_evaluation_batches_cover_every_sample_once(manifest):
    """Evaluation reads every sample once, in shard order and up to the limit."""
    keys = [key for batch in evaluation_batches(ImageSource(manifest, DATA_CONFIG, 32), 5) for key in batch.keys]
    assert keys == [key for shard in manifest.shards for key in shard.keys]
    limited = [
        key for batch in evaluation_batches(ImageSource(manifest, DATA_CONFIG, 32), 5, limit=7) for key in batch.keys
    ]
    assert limited == keys[:7]


def test_evaluation_dataset_equals_evaluation_blocks(manifest, ray_local):
    """Ray Data reads the same evaluation blocks as threads."""
    here = list(evaluation_blocks(ImageSource(manifest, DATA_CONFIG, 32), 5))
    there = [row["block"] for row in evaluation_dataset(ImageSource(manifest, DATA_CONFIG, 32), 5).iter_rows()]
    assert [block.keys for block in there] == [block.keys for block in here]
    assert all(np.array_equal(a.values_P, b.values_P) for a, b in zip(here, there, strict=True))


def test_evaluation_batches_damaged_raises_by_default(damaged_manifest):
    """By default evaluation tolerates no damaged sample."""
    with pytest.raises(RuntimeError, match="damaged"):
        list(evaluation_batches(ImageSource(damaged_manifest, DATA_CONFIG, 32), 4))
    skipped = SkippedSamples(limit=1)
    keys = [
        k
        for b in evaluation_batches(ImageSource(damaged_manifest, DATA_CONFIG, 32), 4, skipped=skipped)
        for k in b.keys
    ]
    assert len(keys) == damaged_manifest.num_samples - 1


def test_training_batches_from_object_store(photo_folders, bucket):
    """Training batches are read from an object store."""
    from bsq_ray.data.pack import PackOptions, pack_images

    manifest = pack_images(str(photo_folders[1]), f"{bucket}/set", PackOptions(max_side=96, num_workers=0)).manifest
    assert np.all([len(batch.keys) == 8 for batch in batches(manifest, 3)])


def remove_members(path, key):
    """Rewrite a shard without the members of a sample, as a faulty tool leaves it."""
    import io
    import tarfile

    archive = io.BytesIO()
    with tarfile.open(path) as source, tarfile.open(fileobj=archive, mode="w") as target:
        for member in source.getmembers():
            if not member.name.startswith(f"{key}."):
                target.addfile(member, source.extractfile(member))
    path.write_bytes(archive.getvalue())


def test_training_batches_shifted_shard_is_detected(damaged_manifest, tmp_path):
    """Samples shifted by a missing tar member are skipped and reported."""
    shard = damaged_manifest.shards[0]
    remove_members(tmp_path / shard.name, shard.keys[4])
    skipped = SkippedSamples(limit=100)
    steps = damaged_manifest.num_samples // 4
    delivered_keys = {
        key for batch in batches(damaged_manifest, steps, batch_size=4, skipped=skipped) for key in batch.keys
    }
    skipped_keys = {line.split(": ")[1] for line in skipped.samples}
    assert skipped_keys == set(shard.keys[4:]) | {shard.keys[2]}
    assert not skipped_keys & delivered_keys
    with pytest.raises(RuntimeError, match=f"data.max_skipped_samples = 1; the last one: {shard.name}"):
        batches(
            damaged_manifest, 10, batch_size=4, data_config=DATA_CONFIG.model_copy(update={"max_skipped_samples": 1})
        )


class ComparedText(str):
    """A text that counts its comparisons."""

    num_comparisons = 0

    def __eq__(self, other):
        ComparedText.num_comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_skipped_samples_are_found_without_scanning():
    """Repeated reports of damaged samples are compared with themselves, not with all others."""
    reports = [ComparedText(f"shard: {number}: damaged") for number in range(2000)]
    skipped = SkippedSamples(limit=2000)
    for first in range(0, 2000, 100):
        skipped.add(reports[first : first + 100])
        skipped.add([ComparedText(text) for text in reports[:100]])
    assert skipped.samples == reports
    assert ComparedText.num_comparisons < 10 * 2000
