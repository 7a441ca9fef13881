"""Packed videos as a source of clips: a random start for training, fixed ones for evaluation.

    video of F frames ─n equal parts─▶ one clip of T frames in each: every `stride`-th frame, one crop for all of them

A clip spans S = (T - 1)·stride + 1 frames. A video has n = min(`data.clips_per_video`, F // S) clips, each inside its
own part of the video, so no two share a frame. Training draws the start inside the part anew in every epoch; evaluation
takes the middle. Videos shorter than S have no clip.

Shape suffixes: P clips, T frames, H and W pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
from PIL import Image

from bsq_ray import config, storage
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.manifest import Manifest, Shard
from bsq_ray.data.shard_reader import ShardFiles
from bsq_ray.data.transforms import eval_transform, sample_crop
from bsq_ray.media.video_reader import read_frames


class ClipSource(DataSource):
    """Clips of `frames` frames of `size` pixels cut from the videos of a manifest.

    Args:
        patience: seconds for which storage may fail before what lies there counts as damaged.

    Attributes:
        notes: how many videos have no clip.

    Raises:
        ValueError: no video is long enough.
    """

    def __init__(
        self, manifest: Manifest, data_config: config.DataConfig, size: int, num_frames: int, timeout_s: float = 0.0
    ) -> None:
        self.manifest, self.data_config, self.size, self.num_frames = manifest, data_config, size, num_frames
        self.timeout_s = timeout_s
        self.url, self.hash = manifest.url, manifest.hash
        self.span = (num_frames - 1) * data_config.frame_stride + 1
        lengths = [[video.frames for video in shard.videos] for shard in manifest.shards]
        # Clips before each video of a shard, and of the whole shard last.
        self._clip_starts = [[0, *accumulate(self._num_clips(length) for length in shard)] for shard in lengths]
        self.shard_sizes = tuple(starts[-1] for starts in self._clip_starts)
        self._shard_starts = [0, *accumulate(self.shard_sizes)]
        self.sample_bytes = 3 * num_frames * size**2
        short_lengths = [length for shard in lengths for length in shard if length < self.span]
        description = (
            f"{self.span} frames of a clip (model.frames {num_frames}, data.frame_stride {data_config.frame_stride})"
        )
        if not self.num_samples:
            raise ValueError(f"no video of {self.url} has the {description}; the longest has {max(short_lengths)}")
        if short_lengths:
            self.notes = (
                f"{len(short_lengths)} of {manifest.num_samples} videos of {self.url} are shorter than the {description}",
            )

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Clips with a random start and a random crop."""
        block = SampleBlock(
            np.empty((len(samples_P), 3, self.num_frames, self.size, self.size), np.uint8), samples_P * 0, []
        )
        files = self._shard_files(samples_P.tolist(), block)
        for row, (sample, epoch) in enumerate(zip(samples_P.tolist(), epochs_P.tolist(), strict=True)):
            rng = np.random.default_rng((seed, epoch, sample))
            clip = self._first_readable(sample, files, rng, block.skipped)
            block.values_P[row], block.labels_P[row] = clip.values_P[0], clip.labels_P[0]
            block.keys += clip.keys
        return block

    def read_eval(self, samples: range) -> SampleBlock:
        """Clips from the middles of the parts, resized to the short side, the centre cut out."""
        shape = (3, self.num_frames, self.size, self.size)
        block = SampleBlock(np.empty((0, *shape), np.uint8), np.empty(0, np.int64), [])
        files = self._shard_files(samples, block)
        clips, labels = [], []
        for sample in samples:
            shard, index, starts = self.locate(sample)
            start = (starts.start + starts.stop - 1) // 2
            try:
                clips.append(self._read_clip(shard, index, start, files, self._center))
            except ValueError as error:
                block.skipped.append(f"{shard.name}: {shard.keys[index]}: {error}")
                continue
            labels.append(shard.labels[index])
            block.keys.append(f"{shard.keys[index]}@{start}")
        if clips:
            block.values_P, block.labels_P = np.stack(clips), np.array(labels, np.int64)
        return block

    def locate(self, sample: int) -> tuple[Shard, int, range]:
        """The shard and the video of a clip (numbered through all shards), and the frames at which it may begin."""
        shard_index = bisect_right(self._shard_starts, sample) - 1
        shard, starts = self.manifest.shards[shard_index], self._clip_starts[shard_index]
        clip_index = sample - self._shard_starts[shard_index]
        index = bisect_right(starts, clip_index) - 1
        length, part, num_parts = (
            shard.videos[index].frames,
            clip_index - starts[index],
            starts[index + 1] - starts[index],
        )
        return shard, index, range(part * length // num_parts, (part + 1) * length // num_parts - self.span + 1)

    def _num_clips(self, length: int) -> int:
        return min(self.data_config.clips_per_video, length // self.span)

    def _shard_files(self, samples: Sequence[int], block: SampleBlock) -> ShardFiles:
        locations = [self.locate(sample)[:2] for sample in samples]
        return ShardFiles(self.manifest, locations, self.timeout_s, block.retries.append)

    def _center(self, image: Image.Image) -> np.ndarray:
        return eval_transform(image, self.size, self.data_config.eval_interpolation)

    def _first_readable(
        self, sample: int, files: ShardFiles, rng: np.random.Generator, skipped: list[str]
    ) -> SampleBlock:
        """The clip, or the next readable one of its shard, so that batches stay full whoever reads them."""
        shard_index = bisect_right(self._shard_starts, sample) - 1
        first, num_clips = self._shard_starts[shard_index], self.shard_sizes[shard_index]
        data_config = self.data_config
        for step in range(num_clips):
            shard, index, starts = self.locate(first + (sample - first + step) % num_clips)
            video, start = shard.videos[index], int(rng.integers(starts.start, starts.stop))
            crop = sample_crop(
                (video.width, video.height), self.size, data_config.resize_range, data_config.random_flip, rng
            )
            try:
                clip = self._read_clip(shard, index, start, files, crop)
            except ValueError as error:
                skipped.append(f"{shard.name}: {shard.keys[index]}: {error}")
                continue
            return SampleBlock(clip[None], np.array([shard.labels[index]]), [f"{shard.keys[index]}@{start}"])
        url = storage.join(self.url, self.manifest.shards[shard_index].name)
        raise RuntimeError(f"no video of {url} can be read; first: {skipped[0]}")

    def _read_clip(
        self, shard: Shard, index: int, start: int, files: ShardFiles, transform: Callable[[Image.Image], np.ndarray]
    ) -> np.ndarray:
        clip_3THW = np.empty((3, self.num_frames, self.size, self.size), np.uint8)
        with files.open(shard, index) as file:
            images = read_frames(file, shard.videos[index], start, self.num_frames, self.data_config.frame_stride)
            for number, image in enumerate(images):
                clip_3THW[:, number] = transform(image)
        return clip_3THW
