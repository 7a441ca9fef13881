"""Clips of packed videos: the same frames for the same order, seed and epoch, with any reader."""

import io
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bsq_ray import config, storage
from bsq_ray.data import shard_reader
from bsq_ray.data.clip_source import ClipLayout, ClipSource
from bsq_ray.data.factory import build_pixel_source, build_source
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images, pack_videos
from bsq_ray.data.stream import SkippedSamples, evaluation_batches, evaluation_dataset, training_batches
from bsq_ray.data.transforms import eval_transform
from bsq_ray.media.frame_display import display_rgb
from bsq_ray.media.video_reader import decode_frames, open_video


def make_source(url, num_frames=4, **overrides):
    return ClipSource(read_manifest(url), config.DataConfig(**{"interleave": 2, **overrides}), 32, num_frames)


def decode_all_frames(manifest, shard, index):
    with shard_reader.ShardFiles(manifest.url, [(shard, index)]).open(shard, index) as file:
        data = file.read()
    with open_video(io.BytesIO(data)) as (container, stream):
        return [Image.fromarray(display_rgb(frame, stream)) for frame in decode_frames(container, stream)]


def test_read_eval_returns_transformed_middle_frames(held_out_video_shards):
    """Evaluation clips are the middle frames of each video after the evaluation transform."""
    source = make_source(held_out_video_shards, frame_stride=3)
    block = source.read_eval(range(source.num_samples))
    assert block.values_P.shape == (2, 3, 4, 32, 32)
    assert block.values_P.dtype == np.uint8
    for sample, key in enumerate(block.keys):
        shard, index, _ = source.locate(sample)
        start = (shard.video(index).frames - 10) // 2
        assert key == f"{shard.keys[index]}@{start}"
        whole = decode_all_frames(source.manifest, shard, index)
        expected = [eval_transform(whole[start + 3 * n], 32, "lanczos") for n in range(4)]
        assert (block.values_P[sample] == np.stack(expected, 1)).all()


def test_read_depends_only_on_sample_epoch_and_seed(video_shards):
    """Training clips depend only on sample number, epoch and seed."""
    source = make_source(video_shards, clips_per_video=3, random_flip=True, resize_range=(1.0, 1.5))
    samples, epochs = np.array([0, 4, 7, 4]), np.array([0, 0, 1, 1])
    first, again = source.read(samples, epochs, seed=5), source.read(samples, epochs, seed=5)
    assert (first.values_P == again.values_P).all()
    assert first.keys == again.keys
    alone = source.read(samples[2:3], epochs[2:3], seed=5)
    assert (alone.values_P[0] == first.values_P[2]).all()
    assert first.keys[1] != first.keys[3], "another epoch starts at another frame"
    assert source.read(samples, epochs, seed=6).keys != first.keys


def test_read_uses_one_crop_for_all_frames(photos, tmp_path):
    """All frames of a clip share one crop."""
    from small_videos import make_video

    (tmp_path / "in").mkdir()
    still = photos[0].resize((96, 64))
    (tmp_path / "in" / "still.mkv").write_bytes(make_video(still, [0, *range(40, 40 * 96 * 4, 40)]))
    pack_videos(str(tmp_path / "in"), str(tmp_path / "out"), PackOptions(num_workers=0))
    # The video moves by one pixel per frame and repeats after 96, so all frames of the clip are alike.
    source = make_source(
        str(tmp_path / "out"), num_frames=4, frame_stride=96, random_flip=True, resize_range=(1.0, 2.0)
    )
    clip_3THW = source.read(np.array([0]), np.array([0]), seed=1).values_P[0].astype(float)
    assert np.abs(clip_3THW - clip_3THW[:, :1]).mean() < 3
    other = source.read(np.array([0]), np.array([1]), seed=1).values_P[0].astype(float)
    assert np.abs(clip_3THW - other).mean() > 6


def test_max_enlargement_limits_the_crops_of_images_and_clips(photos, tmp_path):
    """For samples of 96 x 64 pixels and crops of 32, a range up to 8 without enlargement is a range up to 2."""
    from small_videos import make_video

    for kind, pack, data in (("images", pack_images, None), ("videos", pack_videos, [*range(0, 400, 40)])):
        folder = tmp_path / kind
        folder.mkdir()
        small = photos[0].resize((96, 64))
        if data is None:
            small.save(folder / "small.png")
        else:
            (folder / "small.mkv").write_bytes(make_video(small, data))
        pack(str(folder), str(tmp_path / f"packed-{kind}"), PackOptions(num_workers=0, min_frames=4))
        manifest = read_manifest(str(tmp_path / f"packed-{kind}"))
        crops = []
        for options in ({"resize_range": (1.0, 8.0), "max_enlargement": 1.0}, {"resize_range": (1.0, 2.0)}):
            data_config = config.DataConfig(interleave=2, **options)
            source = (
                ImageSource(manifest, data_config, 32) if data is None else ClipSource(manifest, data_config, 32, 4)
            )
            crops.append(source.read(np.zeros(6, int), np.arange(6), seed=3).values_P)
        assert (crops[0] == crops[1]).all()


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    frames=st.integers(1, 20),
    stride=st.integers(1, 5),
    max_clips=st.integers(1, 50),
)
def test_locate_returns_disjoint_clips_of_every_video(lengths, frames, stride, max_clips):
    """Clips of one video share no frame, and no possible clip is missing."""
    span = (frames - 1) * stride + 1
    expected = [min(max_clips, length // span) for length in lengths]
    layout = ClipLayout(np.array(lengths * 2), np.array([0, len(lengths), 2 * len(lengths)]), span, max_clips)
    assert layout.shard_sizes.tolist() == [sum(expected)] * 2
    ends = dict.fromkeys(range(len(lengths)), 0)
    for clip in range(sum(expected)):
        video, starts = layout.locate(clip)
        assert starts
        assert starts[0] >= ends[video]
        ends[video] = starts[-1] + span
        assert ends[video] <= lengths[video]
        assert layout.shard_of(clip) == (0, sum(expected))
        assert layout.shard_of(sum(expected) + clip) == (sum(expected), sum(expected))


def test_clip_source_reports_short_videos(held_out_video_shards):
    """Videos shorter than a clip are counted; a data set without any clip raises an error."""
    shortest = min(read_manifest(held_out_video_shards).num_frames)
    [note] = make_source(held_out_video_shards, num_frames=int(shortest) + 1).notes
    assert note.startswith("1 of 2 videos")
    with pytest.raises(ValueError, match="has the 5000 frames of a clip .*; the longest has"):
        make_source(held_out_video_shards, num_frames=5000)


def test_training_batches_ray_and_threads_are_identical(video_shards, ray_local):
    """Ray Data and threads deliver the same batches, and workers split them without overlap."""
    source, data_config = (
        make_source(video_shards, clips_per_video=4),
        config.DataConfig(interleave=2, clips_per_video=4),
    )

    def take(count, rank, world_size, executor):
        batches = training_batches(
            source, data_config, batch_size=4, rank=rank, world_size=world_size, seed=3, position=8, executor=executor
        )
        return [next(batches) for _ in range(count)]

    alone = take(3, 0, 1, "local")
    for executor in ("local", "ray"):
        both = [take(3, rank, 2, executor) for rank in (0, 1)]
        for whole, left, right in zip(alone, *both, strict=True):
            assert whole.keys[0::2] == left.keys
            assert whole.keys[1::2] == right.keys
            assert (whole.values_B[1::2] == right.values_B).all()


def test_evaluation_batches_cover_every_clip_once(held_out_video_shards, ray_local):
    """Evaluation reads every clip exactly once, with threads and with Ray Data."""
    source = make_source(held_out_video_shards, clips_per_video=5)
    keys = [key for batch in evaluation_batches(source, 4) for key in batch.keys]
    assert len(set(keys)) == len(keys) == source.num_samples == 10
    rows = evaluation_dataset(source, 4).take_all()
    assert [key for row in rows for key in row["block"].keys] == keys


def test_chunk_bytes_are_bounded_for_any_clip_length(video_shards, monkeypatch):
    """The size of a chunk in bytes is bounded for any number of frames per clip."""
    from bsq_ray.data import stream

    monkeypatch.setattr(stream, "_CHUNK_BYTES", 200_000)
    max_bytes = 0
    for frames in (2, 16):
        source = make_source(video_shards, num_frames=frames, clips_per_video=8)
        read_before = source.read

        def read_and_measure(samples_P, epochs_P, seed, read_before=read_before):
            nonlocal max_bytes
            samples = read_before(samples_P, epochs_P, seed)
            max_bytes = max(max_bytes, samples.values_P.nbytes)
            return samples

        monkeypatch.setattr(source, "read", read_and_measure)
        batches = training_batches(source, config.DataConfig(interleave=2), batch_size=2, rank=0, world_size=1, seed=0)
        for _ in range(6):
            next(batches)
        batches.close()
        assert 0.5 * 200_000 < max_bytes <= 200_000


def test_unreadable_video_is_replaced_or_skipped(video_folders, tmp_path):
    """Training replaces an unreadable video; evaluation skips it."""
    pack_videos(str(video_folders[1]), str(tmp_path), PackOptions(max_side=64, num_workers=0))
    shard = read_manifest(str(tmp_path)).shards[0]
    path = tmp_path / shard.name
    content = bytearray(path.read_bytes())
    content[shard.entry(1).offset : shard.entry(1).offset + shard.entry(1).size] = bytes(shard.entry(1).size)
    path.write_bytes(content)
    source = make_source(str(tmp_path))
    skipped = SkippedSamples(1)
    batch = next(
        training_batches(
            source, config.DataConfig(interleave=1), batch_size=2, rank=0, world_size=1, seed=0, skipped=skipped
        )
    )
    assert {key.split("@")[0] for key in batch.keys} == {shard.keys[0]}
    assert [report.split(": ")[1] for report in skipped.samples] == [shard.keys[1]]
    eval_batches = list(evaluation_batches(source, 2, skipped=SkippedSamples(1)))
    assert [key.split("@")[0] for batch in eval_batches for key in batch.keys] == [shard.keys[0]]
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="no video of .* can be read; first: .*the shard ends after 0"):
        source.read(np.array([0]), np.array([0]), seed=0)


@pytest.mark.parametrize("small", [2**30, 1])
def test_clips_from_object_store_whole_or_by_range(video_folders, bucket, monkeypatch, small):
    """Clips are read from an object store as whole files or by byte range."""
    monkeypatch.setattr(shard_reader, "_SMALL_FILE_BYTES", small)
    pack_videos(str(video_folders[1]), f"{bucket}/set", PackOptions(max_side=64, num_workers=0))
    source = make_source(f"{bucket}/set", clips_per_video=2)
    assert source.read_eval(range(4)).values_P.std() > 10
    assert source.read(np.array([3, 0]), np.array([0, 0]), seed=0).skipped == []


def test_build_source_wrong_data_kind_raises(photo_shards, video_shards):
    """Image shards are rejected by a clip configuration, and video shards by an image configuration."""
    video = config.TokenizerConfig(name="clips", model=config.TokenizerModelConfig(image_size=32, frames=4))
    image = config.TokenizerConfig(name="stills", model=config.TokenizerModelConfig(image_size=32))
    assert isinstance(build_source(video, video_shards), ClipSource)
    with pytest.raises(ValueError, match="contains images, but clips trains on clips of 4 frames"):
        build_source(video, photo_shards)
    with pytest.raises(ValueError, match="contains videos, but stills takes images"):
        build_source(image, video_shards)
    # In evaluation an image is a clip of one frame.
    assert build_pixel_source(video, read_manifest(photo_shards)).read_eval(range(2)).values_P.shape == (2, 3, 32, 32)


class FailsOnceFile:
    """A file whose first read fails like an overloaded object store."""

    def __init__(self, file):
        self.file, self.failed = file, False

    def seek(self, *arguments):
        return self.file.seek(*arguments)

    def read(self, count):
        if not self.failed:
            self.failed = True
            raise OSError("please reduce your request rate")
        return self.file.read(count)


def test_large_video_read_retries_after_storage_error(video_shards, monkeypatch):
    """A storage error during the read of a large video is retried until the timeout."""
    source = make_source(video_shards)
    expected = source.read_eval(range(1))
    open_url = storage.open_url

    @contextmanager
    def open_failing(url):
        with open_url(url) as file:
            yield FailsOnceFile(file)

    monkeypatch.setattr(storage, "open_url", open_failing)
    source.timeout_s = 5.0
    block = source.read_eval(range(1))
    assert block.skipped == []
    assert (block.values_P == expected.values_P).all()
    assert ["please reduce your request rate; trying again" in line for line in block.retries] == [True]
    source.timeout_s = 0.0
    assert "please reduce your request rate" in source.read_eval(range(1)).skipped[0]
