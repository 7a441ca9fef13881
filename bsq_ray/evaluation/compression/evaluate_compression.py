"""Compare the BSQ codec with standard codecs on a folder of images or clips.

    image or clip ─every codec, every quality─▶ file ─▶ bits per pixel, metrics, seconds ─▶ table, plots

A standard codec is compared at our rate, interpolated between its two nearest qualities, and by BD-rate against JPEG
or H.264. A tokenizer with nested bits has a curve, too, with a point at each number of bits.

Shape suffixes: T frames (1 for an image), H and W pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from bsq_ray import model_folder, storage
from bsq_ray.codec.codec import Codec
from bsq_ray.evaluation.compression.clip_files import VideoClip, read_video_clip
from bsq_ray.evaluation.compression.codec_runners import PRIOR, RAW, CodecRunner, ImageRunner, VideoRunner, bsq_runners
from bsq_ray.evaluation.compression.compression_report import compression_markdown, plot_curves, render_examples
from bsq_ray.evaluation.compression.datasets import find_dataset
from bsq_ray.evaluation.compression.distortion import METRICS, DistortionMeter
from bsq_ray.evaluation.compression.image_codecs import standard_codecs, without_metadata
from bsq_ray.evaluation.compression.rate_distortion import Point, Row, compare_at_point, mean_bd_rates, mean_curves
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.media.images import read_image
from bsq_ray.metrics import dists
from bsq_ray.metrics.border_steps import border_step_ratio
from bsq_ray.model_folder import WeightsKind
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress

_ANCHOR = {"images": "JPEG", "clips": "H.264"}
_NUM_EXAMPLES = 6

Content = Image.Image | VideoClip


def evaluate_compression(
    model_url: str,
    data_url: str,
    out_url: str,
    *,
    workers: int = 2,
    address: str | None = None,
    max_frames: int | None = None,
    max_side: int | None = None,
    bits: Sequence[int] = (),
    metrics: Sequence[str] = METRICS,
    weights: WeightsKind = "ema",
    on_progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Compress every file in a folder with every codec; write results.json, results.md, curves.png, comparison.png.

    Args:
        model_url: model folder of a prior, or of a tokenizer (raw bits only).
        data_url: folder of images or of clips; see `find_dataset`.
        out_url: folder for the results.
        workers: Ray actors; 0 runs in this process, without Ray.
        address: Ray cluster; None starts one on this machine.
        max_frames: number of frames of each clip that are used; None uses all.
        max_side: larger images and frames are shrunk to this longer side before compression, pixels.
        bits: numbers of bits per token at which a tokenizer with nested bits is measured; empty uses those that it
            was trained with.
        metrics: names of the metrics; PSNR is always measured. DISTS takes most of the time.
        weights: "ema" or "raw" weights of the model folder.
        on_progress: called with the finished and the total number of files.

    Returns:
        The content of results.json.

    Raises:
        ValueError: the folder contains nothing that can be measured, the model does not exist or has no nested bits, or
            a metric is unknown.
    """
    metrics = _select_metrics(metrics)
    # Actors may have another working folder.
    model_url, data_url, out_url = model_folder.absolute_url(model_url), *map(storage.absolute, (data_url, out_url))
    folder = model_folder.load_model_folder(model_url, weights)
    dataset = find_dataset(data_url)
    reader = _ContentReader(dataset.kind, max_frames, max_side)
    points: dict[str, list[Point]] = {}
    border_steps: dict[str, tuple[float | None, float | None]] = {}
    examples: list[dict[str, np.ndarray]] = []
    build_comparer = partial(_FileComparer, model_url, weights, reader, tuple(bits), metrics)
    outputs = actor_map_ordered(list(dataset.items.values()), build_comparer, workers, address)
    for name, (item_points, border_steps[name], example) in zip(dataset.items, outputs, strict=True):
        points[name] = item_points
        if len(examples) < _NUM_EXAMPLES:
            examples.append(example)
        on_progress(len(points), len(dataset.items))
    curves = mean_curves(points)
    # Without nested bits the curve has one point.
    bsq_curve, anchor = curves.get(PRIOR, curves[RAW]), _ANCHOR[dataset.kind]
    results = {
        "model": model_url,
        "model_id": folder.model_id,
        "weights": weights,
        "data": data_url,
        "dataset": dataset.name,
        "kind": dataset.kind,
        "num_items": len(points),
        "ignored": dataset.ignored,
        "dataset_warnings": dataset.warnings,
        "max_frames": max_frames,
        "max_side": max_side,
        "workers": workers,
        "metrics": metrics,
        "anchor": anchor,
        "curves": curves,
        "at_our_rate": compare_at_point(curves, bsq_curve[-1], (RAW, PRIOR)),
        "at_bits": {
            f"{point['quality']:g}": compare_at_point(curves, point, (RAW, PRIOR))
            for point in bsq_curve
            if len(bsq_curve) > 1
        },
        "bd_rates": {
            name: {codec: asdict(rate) for codec, rate in mean_bd_rates(points, anchor, name).items()}
            for name in metrics
        },
        "undefined": _undefined_metrics(points, metrics),
        "border_step_ratio": _mean_border_steps(list(border_steps.values())),
        "prior_savings": _prior_savings(curves[RAW], curves[PRIOR]) if PRIOR in curves else None,
        "per_item": {name: [asdict(point) for point in item_points] for name, item_points in points.items()},
    }
    storage.write_text(storage.join(out_url, "results.json"), json.dumps(results, indent=1))
    storage.write_text(storage.join(out_url, "results.md"), compression_markdown(results) + "\n")
    storage.write_bytes(storage.join(out_url, "curves.png"), plot_curves(curves, metrics, (RAW, PRIOR)))
    storage.write_bytes(storage.join(out_url, "comparison.png"), render_examples(examples))
    return results


def _select_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics in the order of the report, PSNR always among them."""
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metric {unknown[0]!r}; use {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name == "psnr" or name in names)


def _prior_savings(raw_curve: Sequence[Row], prior_curve: Sequence[Row]) -> float:
    """Return the fraction of the raw files' size that the prior saves, with all bits of the tokens."""
    return 1 - prior_curve[-1]["bits_per_pixel"] / raw_curve[-1]["bits_per_pixel"]


def _mean_border_steps(ratios: list[tuple[float | None, float | None]]) -> dict[str, float] | None:
    """Return the means of original and decoded images that have borders of tiles; None if there are none."""
    defined = [(original, decoded) for original, decoded in ratios if original is not None and decoded is not None]
    if not defined:
        return None
    original, decoded = np.mean(defined, 0).tolist()
    return {"original": original, "decoded": decoded}


def _undefined_metrics(points: Mapping[str, list[Point]], metrics: Sequence[str]) -> dict[str, list[str]]:
    """Return the items for which a metric is not defined, by the name of the metric."""
    missing = {name: [item for item, each in points.items() if name not in each[0].metrics] for name in metrics}
    return {name: items for name, items in missing.items() if items}


@dataclass(frozen=True)
class _ContentReader:
    """Read images or clips, shrunk and without metadata."""

    kind: Literal["images", "clips"]
    max_frames: int | None
    max_side: int | None

    def __call__(self, url: str) -> Content:
        if self.kind == "clips":
            return read_video_clip(url, self.max_frames, self.max_side)
        image = read_image(url)
        if self.max_side is not None and max(image.size) > self.max_side:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        # Without a color profile every codec codes the pixels that its result is compared with.
        return without_metadata(image)


class _FileComparer:
    """Run every codec at every quality on one image or clip."""

    def __init__(
        self,
        model_url: str,
        weights: WeightsKind,
        read: _ContentReader,
        bits: tuple[int, ...],
        metrics: tuple[str, ...],
    ) -> None:
        self.read, self.metrics = read, metrics
        if "dists" in metrics:
            # Missing weights are reported before anything is compressed.
            dists.load_network("cpu")
        codec = Codec.from_pretrained(model_url, weights)
        self.bsq_runners = bsq_runners(codec, read.kind, bits)
        self.tile_size, self.patch_size = codec.token_format.tile_size, codec.token_format.patch_size
        self.standard_runners = _standard_runners(read.kind)
        self.anchor = _ANCHOR[read.kind]

    def __call__(self, url: str) -> tuple[list[Point], tuple[float | None, float | None], dict[str, np.ndarray]]:
        """Return all points of a file, border step ratios, and its example pixels (H, W, 3) by caption.

        The border step ratios are those of the original and of the BSQ codec's output with all bits, in the middle
        frame.

        The examples are the original, the BSQ codec, and the anchor at the nearest bit rate.

        Raises:
            ValueError: the file cannot be read.
        """
        content = self.read(url)
        original_THW3 = _to_frames(content)
        meter, points = DistortionMeter(original_THW3, self.metrics), []
        example = {"original": _middle_frame(original_THW3)}
        for name, runner in self.bsq_runners.items():
            for quality in runner.qualities:
                point, decoded_THW3 = _measure(name, quality, runner, content, meter)
                points.append(point)
        example[_format_point(point)] = _middle_frame(decoded_THW3)
        border_steps = self._border_step_ratio(original_THW3), self._border_step_ratio(decoded_THW3)
        rate, nearest = point.bits_per_pixel, (float("inf"), point, decoded_THW3)
        for name, runner in self.standard_runners.items():
            for quality in runner.qualities:
                point, decoded_THW3 = _measure(name, quality, runner, content, meter)
                points.append(point)
                log_ratio = abs(float(np.log(point.bits_per_pixel / rate)))
                if name == self.anchor and log_ratio < nearest[0]:
                    nearest = (log_ratio, point, decoded_THW3)
        _, point, decoded_THW3 = nearest
        example[_format_point(point)] = _middle_frame(decoded_THW3)
        return points, border_steps, example

    def _border_step_ratio(self, frames_THW3: np.ndarray) -> float | None:
        return border_step_ratio(_middle_frame(frames_THW3), self.tile_size, self.patch_size)


def _standard_runners(kind: Literal["images", "clips"]) -> Mapping[str, CodecRunner]:
    if kind == "images":
        return {name: ImageRunner.from_standard(codec) for name, codec in standard_codecs().items()}
    return {name: VideoRunner.from_standard(codec) for name, codec in standard_video_codecs().items()}


def _middle_frame(frames_THW3: np.ndarray) -> np.ndarray:
    frame_HW3: np.ndarray = frames_THW3[len(frames_THW3) // 2]
    return frame_HW3


def _to_frames(content: Content) -> np.ndarray:
    return content.frames_THW3 if isinstance(content, VideoClip) else np.asarray(content)[None]


def _measure(
    codec: str, quality: float, runner: CodecRunner, content: Any, meter: DistortionMeter
) -> tuple[Point, np.ndarray]:
    """Encode and decode an image or clip; return the measured point and the decoded frames."""
    start = time.perf_counter()
    data = runner.encode(content, quality)
    encoded = time.perf_counter()
    decoded_THW3 = runner.decode(data)
    decoded = time.perf_counter()
    rate = 8 * len(data) / float(np.prod(decoded_THW3.shape[:3]))
    distortion = meter.measure(decoded_THW3)
    return Point(codec, quality, rate, distortion, encoded - start, decoded - encoded), decoded_THW3


def _format_point(point: Point) -> str:
    return f"{point.codec}: {point.bits_per_pixel:.3f} bits/pixel, {point.metrics['psnr']:.1f} dB"
