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
from bsq_ray.data.data_source import Samples, Source
from bsq_ray.data.manifest import Manifest, Shard
from bsq_ray.data.shard_reader import Files
from bsq_ray.data.transforms import draw_crop, evaluation_image
from bsq_ray.media.video_reader import read_frames


class ClipSource(Source):
    """Clips of `frames` frames of `size` pixels cut from the videos of a manifest.

    Args:
        patience: seconds for which storage may fail before what lies there counts as damaged.

    Attributes:
        notes: how many videos have no clip.

    Raises:
        ValueError: no video is long enough.
    """

    def __init__(self, manifest: Manifest, section: config.Data, size: int, frames: int, patience: float = 0.0) -> None:
        self.manifest, self.section, self.size, self.frames = manifest, section, size, frames
        self.patience = patience
        self.url, self.hash = manifest.url, manifest.hash
        self.span = (frames - 1) * section.frame_stride + 1
        lengths = [[video.frames for video in shard.videos] for shard in manifest.shards]
        # Clips before each video of a shard, and of the whole shard last.
        self._starts = [[0, *accumulate(self._clips(length) for length in shard)] for shard in lengths]
        self.shard_sizes = tuple(starts[-1] for starts in self._starts)
        self._shard_starts = [0, *accumulate(self.shard_sizes)]
        self.sample_bytes = 3 * frames * size**2
        short = [length for shard in lengths for length in shard if length < self.span]
        said = f"{self.span} frames of a clip (model.frames {frames}, data.frame_stride {section.frame_stride})"
        if not self.samples:
            raise ValueError(f"no video of {self.url} has the {said}; the longest has {max(short)}")
        if short:
            self.notes = (f"{len(short)} of {manifest.samples} videos of {self.url} are shorter than the {said}",)

    def read(self, samples_P: np.ndarray, epochs_P: np.ndarray, seed: int) -> Samples:
        """Clips with a random start and a random crop."""
        result = Samples(np.empty((len(samples_P), 3, self.frames, self.size, self.size), np.uint8), samples_P * 0, [])
        files = self._files(samples_P.tolist(), result)
        for place, (sample, epoch) in enumerate(zip(samples_P.tolist(), epochs_P.tolist(), strict=True)):
            rng = np.random.default_rng((seed, epoch, sample))
            found = self._first_readable(sample, files, rng, result.damaged)
            result.values_P[place], result.labels_P[place] = found.values_P[0], found.labels_P[0]
            result.keys += found.keys
        return result

    def read_held_out(self, samples: range) -> Samples:
        """Clips from the middles of the parts, resized to the short side, the centre cut out."""
        shape = (3, self.frames, self.size, self.size)
        result = Samples(np.empty((0, *shape), np.uint8), np.empty(0, np.int64), [])
        files = self._files(samples, result)
        clips, labels = [], []
        for sample in samples:
            shard, index, starts = self.locate(sample)
            start = (starts.start + starts.stop - 1) // 2
            try:
                clips.append(self._clip(shard, index, start, files, self._centre))
            except ValueError as error:
                result.damaged.append(f"{shard.name}: {shard.keys[index]}: {error}")
                continue
            labels.append(shard.labels[index])
            result.keys.append(f"{shard.keys[index]}@{start}")
        if clips:
            result.values_P, result.labels_P = np.stack(clips), np.array(labels, np.int64)
        return result

    def locate(self, sample: int) -> tuple[Shard, int, range]:
        """The shard and the video of a clip (numbered through all shards), and the frames at which it may begin."""
        number = bisect_right(self._shard_starts, sample) - 1
        shard, starts = self.manifest.shards[number], self._starts[number]
        place = sample - self._shard_starts[number]
        index = bisect_right(starts, place) - 1
        length, part, parts = shard.videos[index].frames, place - starts[index], starts[index + 1] - starts[index]
        return shard, index, range(part * length // parts, (part + 1) * length // parts - self.span + 1)

    def _clips(self, length: int) -> int:
        return min(self.section.clips_per_video, length // self.span)

    def _files(self, samples: Sequence[int], result: Samples) -> Files:
        places = [self.locate(sample)[:2] for sample in samples]
        return Files(self.manifest, places, self.patience, result.delays.append)

    def _centre(self, image: Image.Image) -> np.ndarray:
        return evaluation_image(image, self.size, self.section.evaluation_filter)

    def _first_readable(self, sample: int, files: Files, rng: np.random.Generator, damaged: list[str]) -> Samples:
        """The clip, or the next readable one of its shard, so that batches stay full whoever reads them."""
        number = bisect_right(self._shard_starts, sample) - 1
        first, size = self._shard_starts[number], self.shard_sizes[number]
        section = self.section
        for step in range(size):
            shard, index, starts = self.locate(first + (sample - first + step) % size)
            video, start = shard.videos[index], int(rng.integers(starts.start, starts.stop))
            crop = draw_crop((video.width, video.height), self.size, section.crop_scale, section.flip, rng)
            try:
                clip = self._clip(shard, index, start, files, crop)
            except ValueError as error:
                damaged.append(f"{shard.name}: {shard.keys[index]}: {error}")
                continue
            return Samples(clip[None], np.array([shard.labels[index]]), [f"{shard.keys[index]}@{start}"])
        url = storage.join(self.url, self.manifest.shards[number].name)
        raise RuntimeError(f"no video of {url} can be read; first: {damaged[0]}")

    def _clip(
        self, shard: Shard, index: int, start: int, files: Files, cut: Callable[[Image.Image], np.ndarray]
    ) -> np.ndarray:
        clip_3THW = np.empty((3, self.frames, self.size, self.size), np.uint8)
        with files.open(shard, index) as file:
            images = read_frames(file, shard.videos[index], start, self.frames, self.section.frame_stride)
            for number, image in enumerate(images):
                clip_3THW[:, number] = cut(image)
        return clip_3THW
