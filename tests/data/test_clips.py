"""Clips of packed videos: the same frames for the same order, seed and epoch, whoever reads."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsq_ray import config, storage
from bsq_ray.data import shard_reader
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.factory import open_pixels, open_source
from bsq_ray.data.manifest import Manifest, Shard, Video, read_manifest
from bsq_ray.data.pack import pack_videos
from bsq_ray.data.stream import Damage, evaluation_batches, evaluation_dataset, training_batches
from bsq_ray.data.transforms import evaluation_image
from bsq_ray.media.video_reader import decode, open_video, upright


def clips(url, frames=4, **section):
    return ClipSource(read_manifest(url), config.Data(**{"lanes": 2, **section}), 32, frames)


def frames_of(manifest, shard, index):
    with shard_reader.Files(manifest, [(shard, index)]).open(shard, index) as file:
        data = file.read()
    with open_video(io.BytesIO(data)) as (container, stream):
        return [upright(frame) for frame in decode(container, stream)]


def test_evaluation_clips_are_the_middle_frames_through_the_evaluation_transform(held_out_video_shards):
    source = clips(held_out_video_shards, frame_stride=3)
    found = source.read_held_out(range(source.samples))
    assert found.values_P.shape == (2, 3, 4, 32, 32)
    assert found.values_P.dtype == np.uint8
    for sample, key in enumerate(found.keys):
        shard, index, _ = source.locate(sample)
        start = (shard.videos[index].frames - 10) // 2
        assert key == f"{shard.keys[index]}@{start}"
        whole = frames_of(source.manifest, shard, index)
        expected = [evaluation_image(whole[start + 3 * n], 32, "lanczos") for n in range(4)]
        assert (found.values_P[sample] == np.stack(expected, 1)).all()


def test_training_clips_depend_on_order_seed_and_epoch_only(video_shards):
    source = clips(video_shards, clips_per_video=3, flip=True, crop_scale=(1.0, 1.5))
    samples, epochs = np.array([0, 4, 7, 4]), np.array([0, 0, 1, 1])
    first, again = source.read(samples, epochs, seed=5), source.read(samples, epochs, seed=5)
    assert (first.values_P == again.values_P).all()
    assert first.keys == again.keys
    alone = source.read(samples[2:3], epochs[2:3], seed=5)
    assert (alone.values_P[0] == first.values_P[2]).all()
    assert first.keys[1] != first.keys[3], "another epoch begins at another frame"
    assert source.read(samples, epochs, seed=6).keys != first.keys


def test_all_frames_of_a_clip_are_cropped_alike(photos, tmp_path):
    from small_videos import made_video

    (tmp_path / "in").mkdir()
    still = photos[0].resize((96, 64))
    (tmp_path / "in" / "still.mkv").write_bytes(made_video(still, [0, *range(40, 40 * 96 * 4, 40)]))
    pack_videos(str(tmp_path / "in"), str(tmp_path / "out"), workers=0)
    # The video moves by a pixel a frame and is as it was after 96: so is every frame of the clip.
    source = clips(str(tmp_path / "out"), frames=4, frame_stride=96, flip=True, crop_scale=(1.0, 2.0))
    clip_3THW = source.read(np.array([0]), np.array([0]), seed=1).values_P[0].astype(float)
    assert np.abs(clip_3THW - clip_3THW[:, :1]).mean() < 3
    other = source.read(np.array([0]), np.array([1]), seed=1).values_P[0].astype(float)
    assert np.abs(clip_3THW - other).mean() > 6


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    frames=st.integers(1, 20),
    stride=st.integers(1, 5),
    most=st.integers(1, 50),
)
def test_clips_of_a_video_share_no_frame_and_none_is_left_out(lengths, frames, stride, most):
    videos = tuple(Video(length, 25.0, 64, 64, (0,), (0,)) for length in lengths)
    keys = tuple(str(n) for n in range(len(lengths)))
    shard = Shard("s", 1, "", keys, (0,) * len(keys), (0,) * len(keys), (1,) * len(keys), videos)
    section, span = config.Data(frame_stride=stride, clips_per_video=most), (frames - 1) * stride + 1
    expected = [min(most, length // span) for length in lengths]
    manifest = Manifest("x", (shard, shard), ("all",), "videos")
    if not sum(expected):
        with pytest.raises(ValueError, match=f"no video of x has the {span} frames"):
            ClipSource(manifest, section, 8, frames)
        return
    source = ClipSource(manifest, section, 8, frames)
    assert source.shard_sizes == (sum(expected),) * 2
    assert len(source.notes) == any(length < span for length in lengths)
    ends = dict.fromkeys(keys, 0)
    for sample in range(source.shard_sizes[0]):
        _, index, starts = source.locate(sample)
        assert starts
        assert starts[0] >= ends[keys[index]]
        ends[keys[index]] = starts[-1] + span
        assert ends[keys[index]] <= lengths[index]


def test_ray_and_threads_give_the_same_batches_and_workers_share_them(video_shards, ray_local):
    source, section = clips(video_shards, clips_per_video=4), config.Data(lanes=2, clips_per_video=4)

    def first(count, rank, world, executor):
        batches = training_batches(source, section, 4, rank, world, seed=3, position=8, executor=executor)
        return [next(batches) for _ in range(count)]

    alone = first(3, 0, 1, "local")
    for executor in ("local", "ray"):
        both = [first(3, rank, 2, executor) for rank in (0, 1)]
        for whole, left, right in zip(alone, *both, strict=True):
            assert whole.keys[0::2] == left.keys
            assert whole.keys[1::2] == right.keys
            assert (whole.values_B[1::2] == right.values_B).all()


def test_evaluation_covers_every_clip_once(held_out_video_shards, ray_local):
    source = clips(held_out_video_shards, clips_per_video=5)
    keys = [key for batch in evaluation_batches(source, 4) for key in batch.keys]
    assert len(set(keys)) == len(keys) == source.samples == 10
    rows = evaluation_dataset(source, 4).take_all()
    assert [key for row in rows for key in row["block"].keys] == keys


def test_what_a_chunk_holds_is_bounded_whatever_the_number_of_frames(video_shards, monkeypatch):
    from bsq_ray.data import stream

    monkeypatch.setattr(stream, "_CHUNK_BYTES", 200_000)
    longest = 0
    for frames in (2, 16):
        source = clips(video_shards, frames=frames, clips_per_video=8)
        read_before = source.read

        def watched(samples_P, epochs_P, seed, read_before=read_before):
            nonlocal longest
            samples = read_before(samples_P, epochs_P, seed)
            longest = max(longest, samples.values_P.nbytes)
            return samples

        monkeypatch.setattr(source, "read", watched)
        batches = training_batches(source, config.Data(lanes=2), 2, 0, 1, seed=0)
        for _ in range(6):
            next(batches)
        batches.close()
        assert 0.5 * 200_000 < longest <= 200_000


def test_a_video_that_cannot_be_read_is_replaced_in_training_and_left_out_in_evaluation(video_folders, tmp_path):
    pack_videos(str(video_folders[1]), str(tmp_path), max_side=64, workers=0)
    shard = read_manifest(str(tmp_path)).shards[0]
    path = tmp_path / shard.name
    content = bytearray(path.read_bytes())
    content[shard.offsets[1] : shard.offsets[1] + shard.sizes[1]] = bytes(shard.sizes[1])
    path.write_bytes(content)
    source = clips(str(tmp_path))
    damage = Damage(1)
    batch = next(training_batches(source, config.Data(lanes=1), 2, 0, 1, seed=0, damage=damage))
    assert {key.split("@")[0] for key in batch.keys} == {shard.keys[0]}
    assert [report.split(": ")[1] for report in damage.found] == [shard.keys[1]]
    left = list(evaluation_batches(source, 2, damage=Damage(1)))
    assert [key.split("@")[0] for batch in left for key in batch.keys] == [shard.keys[0]]
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="no video of .* can be read; first: .*the shard ends after 0"):
        source.read(np.array([0]), np.array([0]), seed=0)


@pytest.mark.parametrize("small", [2**30, 1])
def test_clips_come_from_an_object_store_whole_or_in_parts(video_folders, bucket, monkeypatch, small):
    monkeypatch.setattr(shard_reader, "_SMALL", small)
    pack_videos(str(video_folders[1]), f"{bucket}/set", max_side=64, workers=0)
    source = clips(f"{bucket}/set", clips_per_video=2)
    assert source.read_held_out(range(4)).values_P.std() > 10
    assert source.read(np.array([3, 0]), np.array([0, 0]), seed=0).damaged == []


def test_images_and_videos_are_not_taken_for_each_other(photo_shards, video_shards):
    video = config.TokenizerConfig(name="clips", model=config.TokenizerModel(image_size=32, frames=4))
    image = config.TokenizerConfig(name="stills", model=config.TokenizerModel(image_size=32))
    assert isinstance(open_source(video, video_shards), ClipSource)
    with pytest.raises(ValueError, match="holds images, but clips trains on clips of 4 frames"):
        open_source(video, photo_shards)
    with pytest.raises(ValueError, match="holds videos, but stills takes images"):
        open_source(image, video_shards)
    # Measured, an image is a clip of one frame.
    assert open_pixels(video, read_manifest(photo_shards)).read_held_out(range(2)).values_P.shape == (2, 3, 32, 32)


class FailingOnce:
    """A file whose first reading of content fails as an object store does that is overloaded."""

    def __init__(self, file):
        self.file, self.failed = file, False

    def seek(self, *place):
        return self.file.seek(*place)

    def read(self, count):
        if not self.failed:
            self.failed = True
            raise OSError("please reduce your request rate")
        return self.file.read(count)


def test_storage_that_fails_while_a_large_video_is_read_is_asked_again(video_shards, monkeypatch):
    source = clips(video_shards)
    expected = source.read_held_out(range(1))
    open_url = storage.open_url

    @contextmanager
    def failing(url, mode="rb"):
        with open_url(url, mode) as file:
            yield FailingOnce(file)

    monkeypatch.setattr(storage, "open_url", failing)
    source.patience = 5.0
    found = source.read_held_out(range(1))
    assert found.damaged == []
    assert (found.values_P == expected.values_P).all()
    assert ["please reduce your request rate; trying again" in line for line in found.delays] == [True]
    source.patience = 0.0
    assert "please reduce your request rate" in source.read_held_out(range(1)).damaged[0]
