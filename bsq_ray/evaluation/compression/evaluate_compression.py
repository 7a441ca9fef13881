"""Rate and distortion of our codec beside the standard ones, on a folder of images or clips.

    image or clip ─every codec, every quality─▶ file ─▶ bits per pixel, PSNR, MS-SSIM, LPIPS, seconds ─▶ table, plots

Standard codecs are shown at our rate, between their two nearest qualities, and as BD-rate against JPEG or H.264.

Shape suffixes: T frames (1 of an image), H and W pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from bsq_ray import model_folder, storage
from bsq_ray.codec.codec import Codec
from bsq_ray.data.transforms import read_image, to_float
from bsq_ray.evaluation.compression.clip_files import VideoClip, read_video_clip
from bsq_ray.evaluation.compression.compression_report import compression_markdown, plot_curves, render_examples
from bsq_ray.evaluation.compression.datasets import find_dataset
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.evaluation.compression.rate_distortion import (
    METRICS,
    Point,
    interpolate_at_rate,
    mean_bd_rates,
    mean_curves,
)
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import MS_SSIM_SIDE, multi_scale_similarity
from bsq_ray.runtime.actor_pool import actor_map_ordered

RAW, PRIOR = "BSQ, raw bits", "BSQ with prior"
_ANCHOR = {"images": "JPEG", "clips": "H.264"}
_NUM_EXAMPLES = 6
# Frames of a clip that LPIPS looks at, evenly spaced: it takes as long as all the rest.
_LPIPS_FRAMES = 8

Content = Image.Image | VideoClip


def evaluate_compression(
    model_url: str,
    data_url: str,
    out_url: str,
    workers: int = 2,
    address: str | None = None,
    max_frames: int | None = None,
    max_side: int | None = None,
    weights: Literal["ema", "plain"] = "ema",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compresses everything in a folder with everything; writes results.json, results.md, curves.png, pictures.png.

    Args:
        model_url: model folder of a prior, or of a tokenizer (raw bits only).
        data_url: folder of images, or of clips; see `benchmark_sets`.
        workers: Ray actors; 0 works in this process, without Ray.
        frames: of each clip only the first so many.
        max_side: larger images and frames are shrunk to this longer side before anything is compressed.

    Returns:
        The content of results.json.

    Raises:
        ValueError: the folder holds nothing that can be measured, or the model is missing.
    """
    folder = model_folder.load_model_folder(model_url, weights)
    dataset = find_dataset(data_url)
    reader = _ContentReader(dataset.kind, max_frames, max_side)
    points: dict[str, list[Point]] = {}
    examples: list[dict[str, np.ndarray]] = []
    build_comparer = partial(_FileComparer, model_url, weights, reader)
    outputs = actor_map_ordered(list(dataset.items.values()), build_comparer, workers, address)
    for name, (item_points, example) in zip(dataset.items, outputs, strict=True):
        points[name] = item_points
        if len(examples) < _NUM_EXAMPLES:
            examples.append(example)
        on_progress(len(points), len(dataset.items))
    curves = mean_curves(points)
    bsq_rate = curves.get(PRIOR, curves[RAW])[0]["bits_per_pixel"]
    results = {
        "model": model_url,
        "model_id": folder.model_id,
        "weights": weights,
        "data": data_url,
        "set": dataset.name,
        "kind": dataset.kind,
        "items": len(points),
        "frames": max_frames,
        "max_side": max_side,
        "workers": workers,
        "anchor": _ANCHOR[dataset.kind],
        "curves": curves,
        "at_our_rate": {codec: interpolate_at_rate(rows, bsq_rate) for codec, rows in curves.items()},
        "bd_rate": mean_bd_rates(points, _ANCHOR[dataset.kind]),
        "prior_saves": 1 - bsq_rate / curves[RAW][0]["bits_per_pixel"] if PRIOR in curves else None,
        "per_item": {name: [asdict(point) for point in item_points] for name, item_points in points.items()},
    }
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    storage.write_bytes(storage.join(out_url, "results.md"), (compression_markdown(results) + "\n").encode())
    storage.write_bytes(storage.join(out_url, "curves.png"), plot_curves(curves, (RAW, PRIOR)))
    storage.write_bytes(storage.join(out_url, "pictures.png"), render_examples(examples))
    return results


@dataclass(frozen=True)
class _ContentReader:
    kind: Literal["images", "clips"]
    max_frames: int | None
    max_side: int | None

    def __call__(self, url: str) -> Content:
        if self.kind == "clips":
            return read_video_clip(url, self.max_frames, self.max_side)
        image = read_image(url)
        if self.max_side is not None and max(image.size) > self.max_side:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        return image


@dataclass(frozen=True)
class _CodecRunner:
    """How a codec makes a file of an image or clip and gets frames (T, H, W, 3) back, at each of its qualities."""

    qualities: tuple[float, ...]
    encode: Callable[[Any, float], bytes]
    decode: Callable[[bytes], np.ndarray]


class _FileComparer:
    """Every codec at every quality on one image or clip."""

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], read: _ContentReader) -> None:
        self.read = read
        self.standard_runners = _standard_runners(read.kind)
        self.bsq_runners = _bsq_runners(model_url, weights, read.kind)
        self.anchor = _ANCHOR[read.kind]

    def __call__(self, url: str) -> tuple[list[Point], dict[str, np.ndarray]]:
        """Its points, and what is pictured: original, ours, the anchor at the nearest size."""
        content = self.read(url)
        original_THW3 = _to_frames(content)
        height, width = original_THW3.shape[1:3]
        if min(height, width) <= MS_SSIM_SIDE:
            raise ValueError(f"{url} is {width} x {height}; MS-SSIM needs sides above {MS_SSIM_SIDE} pixels")
        points: list[Point] = []
        example = {"original": original_THW3[len(original_THW3) // 2]}
        for name, runner in self.bsq_runners.items():
            point, decoded_THW3 = _measure(name, 0.0, runner, content, original_THW3)
            points.append(point)
        example[_format_point(point)] = decoded_THW3[len(decoded_THW3) // 2]
        rate, nearest = point.bits_per_pixel, (float("inf"), point, decoded_THW3)
        for name, runner in self.standard_runners.items():
            for quality in runner.qualities:
                point, decoded_THW3 = _measure(name, quality, runner, content, original_THW3)
                points.append(point)
                log_ratio = abs(float(np.log(point.bits_per_pixel / rate)))
                if name == self.anchor and log_ratio < nearest[0]:
                    nearest = (log_ratio, point, decoded_THW3)
        example[_format_point(nearest[1])] = nearest[2][len(nearest[2]) // 2]
        return points, example


def _bsq_runners(
    model_url: str, weights: Literal["ema", "plain"], kind: Literal["images", "clips"]
) -> dict[str, _CodecRunner]:
    codec = Codec.from_pretrained(model_url, weights)
    codecs = {RAW: codec} if codec.prior is None else {RAW: Codec(codec.tokenizer), PRIOR: codec}
    build_runner = _bsq_image_runner if kind == "images" else _bsq_clip_runner
    return {name: build_runner(each) for name, each in codecs.items()}


def _bsq_image_runner(codec: Codec) -> _CodecRunner:
    return _image_runner((0.0,), lambda image, quality: codec.compress(image).data, codec.decompress)


def _bsq_clip_runner(codec: Codec) -> _CodecRunner:
    return _CodecRunner(
        (0.0,),
        lambda clip, quality: codec.compress_clip(clip.frames_THW3, clip.rate).data,
        lambda data: np.stack(list(codec.decompress_clip(data))),
    )


def _standard_runners(kind: Literal["images", "clips"]) -> dict[str, _CodecRunner]:
    if kind == "images":
        return {
            name: _image_runner(each.qualities, each.encode, each.decode) for name, each in standard_codecs().items()
        }
    return {
        name: _CodecRunner(each.qualities, each.encode, each.decode) for name, each in standard_video_codecs().items()
    }


def _image_runner(
    qualities: tuple[float, ...],
    encode: Callable[[Image.Image, float], bytes],
    decode: Callable[[bytes], Image.Image],
) -> _CodecRunner:
    return _CodecRunner(qualities, encode, lambda data: _to_frames(decode(data)))


def _to_frames(content: Content) -> np.ndarray:
    return content.frames_THW3 if isinstance(content, VideoClip) else np.asarray(content)[None]


def _measure(
    codec: str, quality: float, runner: _CodecRunner, content: Content, original_THW3: np.ndarray
) -> tuple[Point, np.ndarray]:
    began = time.perf_counter()
    data = runner.encode(content, quality)
    middle = time.perf_counter()
    decoded_THW3 = runner.decode(data)
    ended = time.perf_counter()
    assert decoded_THW3.shape == original_THW3.shape, f"{codec} gave {decoded_THW3.shape}"
    rate = 8 * len(data) / float(np.prod(original_THW3.shape[:3]))
    return Point(
        codec, quality, rate, _distortion(original_THW3, decoded_THW3), middle - began, ended - middle
    ), decoded_THW3


def _distortion(original_THW3: np.ndarray, decoded_THW3: np.ndarray) -> dict[str, float]:
    """Means over frames; LPIPS over some of them."""
    num_frames = len(original_THW3)
    lpips_frames = set(np.linspace(0, num_frames - 1, min(num_frames, _LPIPS_FRAMES)).round().astype(int).tolist())
    values: Mapping[str, list[float]] = {name: [] for name in METRICS}
    for t in range(num_frames):
        pair = _to_tensor(original_THW3[t]), _to_tensor(decoded_THW3[t])
        values["psnr"].append(float(psnr(*pair)))
        values["ms_ssim"].append(float(multi_scale_similarity(*pair)))
        if t in lpips_frames:
            values["lpips"].append(float(lpips(*pair)))
    return {name: float(np.mean(each)) for name, each in values.items()}


def _to_tensor(pixels_HW3: np.ndarray) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(pixels_HW3)).permute(2, 0, 1)[None])


def _format_point(point: Point) -> str:
    return f"{point.codec}: {point.bits_per_pixel:.3f} bits/pixel, {point.metrics['psnr']:.1f} dB"
