"""Packed videos as a data source of clips: random start frames for training, fixed ones for evaluation.

    video of F frames ─n equal parts─▶ one clip of T frames in each: every `stride`-th frame, the same crop of all

A clip spans S = (T - 1)·stride + 1 frames. A video has n = min(`data.clips_per_video`, F // S) clips. Each lies inside
its own part of the video, so no two share a frame. Training draws a new start inside the part in every epoch;
evaluation uses the middle. Videos shorter than S have no clip.

Shape suffixes: P clips, T frames, H and W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image

from bsq_ray import config, storage
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.file_cache import open_shard_cache
from bsq_ray.data.manifest import Manifest
from bsq_ray.data.sample_index import Shard
from bsq_ray.data.shard_reader import ShardFiles, locate_samples
from bsq_ray.data.transforms import eval_transform, sample_crop
from bsq_ray.media.video_reader import read_frames
from bsq_ray.runtime.random_streams import RandomStream, stream_rng


@dataclass(frozen=True, eq=False)
class ClipLayout:
    """The clips of all videos, numbered through the shards.

    Args:
        num_frames: frames of each video, int (videos,).
        shard_starts: number of videos before each shard, and the total last.
        span: frames that a clip spans.
        clips_per_video: largest number of clips of a video.
    """

    num_frames: np.ndarray
    shard_starts: np.ndarray
    span: int
    clips_per_video: int

    @cached_property
    def clip_starts(self) -> np.ndarray:
        """Number of clips before each video, and the total last; int64 (videos + 1,)."""
        return np.concatenate([[0], np.cumsum(np.minimum(self.clips_per_video, self.num_frames // self.span))])

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Clips of each shard, int64 (shards,)."""
        return np.diff(self.clip_starts[self.shard_starts])

    def shard_of(self, clip: int) -> tuple[int, int]:
        """Return the first clip of the shard that contains a clip, and the number of clips of this shard."""
        ends = self.clip_starts[self.shard_starts]
        shard = int(np.searchsorted(ends, clip, side="right")) - 1
        return int(ends[shard]), int(ends[shard + 1] - ends[shard])

    def locate(self, clip: int) -> tuple[int, range]:
        """Return the video of a clip (numbered through all shards), and the possible start frames of the clip."""
        video = int(np.searchsorted(self.clip_starts, clip, side="right")) - 1
        num_frames, part = int(self.num_frames[video]), clip - int(self.clip_starts[video])
        num_parts = int(self.clip_starts[video + 1] - self.clip_starts[video])
        return video, range(part * num_frames // num_parts, (part + 1) * num_frames // num_parts - self.span + 1)


@lru_cache(8)
def _clip_layout(manifest: Manifest, span: int, clips_per_video: int) -> ClipLayout:
    return ClipLayout(manifest.num_frames, manifest.shard_starts, span, clips_per_video)


class ClipSource(DataSource):
    """Crops of clips of the videos of a manifest: squares, or for training of another size, see `with_crop`.

    Args:
        manifest: a data set of videos.
        data_config: crop, flip, interpolation, frame stride and clips per video.
        size: side of a frame, pixels.
        num_frames: frames of a clip (T).
        timeout_s: seconds to retry unavailable storage before a sample counts as damaged.

    Attributes:
        crop_hw: height and width of a training crop, pixels.
        notes: number of videos without a clip, if any.

    Raises:
        ValueError: no video is long enough.
    """

    def __init__(
        self, manifest: Manifest, data_config: config.DataConfig, size: int, num_frames: int, timeout_s: float = 0.0
    ) -> None:
        self.manifest, self.data_config, self.size, self.num_frames = manifest, data_config, size, num_frames
        self.timeout_s = timeout_s
        self.url, self.hash, self.cache = manifest.url, manifest.hash, open_shard_cache(data_config)
        self.span = (num_frames - 1) * data_config.frame_stride + 1
        self.crop_hw = (size, size)
        self.sample_bytes = 3 * num_frames * size**2
        num_short = int(np.count_nonzero(manifest.num_frames < self.span))
        clip_text = (
            f"{self.span} frames of a clip (model.frames {num_frames}, data.frame_stride {data_config.frame_stride})"
        )
        if not self.num_samples:
            longest = manifest.num_frames.max(initial=0)
            raise ValueError(f"no video of {self.url} has the {clip_text}; the longest has {longest}")
        if num_short:
            self.notes = (
                f"{num_short} of {manifest.num_samples} videos of {self.url} are shorter than the {clip_text}",
            )

    def with_crop(self, crop_hw: tuple[int, int]) -> ClipSource:
        """Return the same clips with training crops of another height and width."""
        source = copy.copy(self)
        source.crop_hw, source.sample_bytes = crop_hw, 3 * self.num_frames * crop_hw[0] * crop_hw[1]
        return source

    @property
    def _layout(self) -> ClipLayout:
        return _clip_layout(self.manifest, self.span, self.data_config.clips_per_video)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Clips of each shard."""
        return self._layout.shard_sizes

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> SampleBlock:
        """Read clips with a random start and a random crop, uint8 (P, 3, T, H, W)."""
        values_P = np.empty((len(samples_P), 3, self.num_frames, *self.crop_hw), np.uint8)
        block = SampleBlock(values_P, samples_P * 0, [])
        files = self._shard_files(samples_P.tolist(), block)
        for row, (sample, epoch) in enumerate(zip(samples_P.tolist(), epochs_P.tolist(), strict=True)):
            rng = stream_rng(RandomStream.CLIP_CROP, seed, epoch, sample)
            clip = self._first_readable(sample, files, rng, block.skipped)
            block.values_P[row], block.labels_P[row] = clip.values_P[0], clip.labels_P[0]
            block.keys += clip.keys
        return block

    def read_eval(self, samples: range) -> SampleBlock:
        """Read center crops of the middle clip of each part, uint8 (P, 3, T, size, size)."""
        shape = (3, self.num_frames, self.size, self.size)
        block = SampleBlock(np.empty((0, *shape), np.uint8), np.empty(0, np.int64), [])
        files = self._shard_files(samples, block)
        clips, labels = [], []
        for sample in samples:
            shard, index, starts = self.locate(sample)
            entry, start = shard.entry(index), (starts.start + starts.stop - 1) // 2
            try:
                clips.append(self._read_clip(shard, index, start, files, self._center, shape[2:]))
            except ValueError as error:
                block.skipped.append(f"{shard.name}: {entry.key}: {error}")
                continue
            labels.append(entry.label)
            block.keys.append(f"{entry.key}@{start}")
        if clips:
            block.values_P, block.labels_P = np.stack(clips), np.array(labels, np.int64)
        return block

    def locate(self, sample: int) -> tuple[Shard, int, range]:
        """Return the shard and the video of a clip (numbered through all shards), and its possible start frames."""
        video, starts = self._layout.locate(sample)
        return *self.manifest.locate(video), starts

    def _shard_files(self, samples: Iterable[int], block: SampleBlock) -> ShardFiles:
        videos = [self._layout.locate(sample)[0] for sample in samples]
        on_retry = block.retries.append
        locations = locate_samples(self.manifest, videos, self.timeout_s, on_retry)
        return ShardFiles(self.url, locations, self.timeout_s, on_retry, self.cache)

    def _center(self, image: Image.Image) -> np.ndarray:
        return eval_transform(image, self.size, self.data_config.eval_interpolation)

    def _first_readable(
        self, sample: int, files: ShardFiles, rng: np.random.Generator, skipped: list[str]
    ) -> SampleBlock:
        """Return the clip, or the next readable one of its shard, so that batches stay full for any reader."""
        first, num_clips = self._layout.shard_of(sample)
        data_config = self.data_config
        for step in range(num_clips):
            shard, index, starts = self.locate(first + (sample - first + step) % num_clips)
            entry, video, start = shard.entry(index), shard.video(index), int(rng.integers(starts.start, starts.stop))
            crop = sample_crop(
                (video.width, video.height),
                self.crop_hw,
                data_config.resize_range,
                data_config.max_enlargement,
                data_config.random_flip,
                rng,
            )
            try:
                clip = self._read_clip(shard, index, start, files, crop, self.crop_hw)
            except ValueError as error:
                skipped.append(f"{shard.name}: {entry.key}: {error}")
                continue
            return SampleBlock(clip[None], np.array([entry.label]), [f"{entry.key}@{start}"])
        url = storage.join(self.url, shard.name)
        raise RuntimeError(f"no video of {url} can be read; first: {skipped[0]}")

    def _read_clip(
        self,
        shard: Shard,
        index: int,
        start: int,
        files: ShardFiles,
        transform: Callable[[Image.Image], np.ndarray],
        frame_hw: tuple[int, int],
    ) -> np.ndarray:
        """Return the frames of a clip, uint8 (3, T, H, W); `transform` makes frames of `frame_hw`."""
        clip_3THW = np.empty((3, self.num_frames, *frame_hw), np.uint8)
        with files.open(shard, index) as file:
            images = read_frames(file, shard.video(index), start, self.num_frames, self.data_config.frame_stride)
            for number, image in enumerate(images):
                clip_3THW[:, number] = transform(image)
        return clip_3THW
