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
from bsq_ray.evaluation.compression.compression_report import markdown, picture_sheet, plot_curves
from bsq_ray.evaluation.compression.datasets import find_set
from bsq_ray.evaluation.compression.image_codecs import standard_codecs
from bsq_ray.evaluation.compression.rate_distortion import METRICS, Point, at_rate, mean_bd_rates, mean_curves
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import MS_SSIM_SIDE, multi_scale_similarity
from bsq_ray.runtime.actor_pool import actor_map_ordered

RAW, PRIOR = "BSQ, raw bits", "BSQ with prior"
_ANCHOR = {"images": "JPEG", "clips": "H.264"}
_PICTURED = 6
# Frames of a clip that LPIPS looks at, evenly spaced: it takes as long as all the rest.
_LPIPS_FRAMES = 8

Content = Image.Image | VideoClip


def evaluate_compression(
    model_url: str,
    data_url: str,
    out_url: str,
    workers: int = 2,
    address: str | None = None,
    frames: int | None = None,
    max_side: int | None = None,
    weights: Literal["ema", "plain"] = "ema",
    progress: Callable[[int, int], None] = lambda done, total: None,
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
    found = find_set(data_url)
    reading = _Reading(found.kind, frames, max_side)
    points: dict[str, list[Point]] = {}
    pictures: list[dict[str, np.ndarray]] = []
    compare = partial(_Comparer, model_url, weights, reading)
    each = actor_map_ordered(list(found.items.values()), compare, workers, address)
    for name, (its_points, shown) in zip(found.items, each, strict=True):
        points[name] = its_points
        if len(pictures) < _PICTURED:
            pictures.append(shown)
        progress(len(points), len(found.items))
    curves = mean_curves(points)
    ours = curves.get(PRIOR, curves[RAW])[0]["bits_per_pixel"]
    results = {
        "model": model_url,
        "model_id": folder.model_id,
        "weights": weights,
        "data": data_url,
        "set": found.name,
        "kind": found.kind,
        "items": len(points),
        "frames": frames,
        "max_side": max_side,
        "workers": workers,
        "anchor": _ANCHOR[found.kind],
        "curves": curves,
        "at_our_rate": {codec: at_rate(rows, ours) for codec, rows in curves.items()},
        "bd_rate": mean_bd_rates(points, _ANCHOR[found.kind]),
        "prior_saves": 1 - ours / curves[RAW][0]["bits_per_pixel"] if PRIOR in curves else None,
        "per_item": {name: [asdict(point) for point in its_points] for name, its_points in points.items()},
    }
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    storage.write_bytes(storage.join(out_url, "results.md"), (markdown(results) + "\n").encode())
    storage.write_bytes(storage.join(out_url, "curves.png"), plot_curves(curves, (RAW, PRIOR)))
    storage.write_bytes(storage.join(out_url, "pictures.png"), picture_sheet(pictures))
    return results


@dataclass(frozen=True)
class _Reading:
    kind: Literal["images", "clips"]
    frames: int | None
    max_side: int | None

    def __call__(self, url: str) -> Content:
        if self.kind == "clips":
            return read_video_clip(url, self.frames, self.max_side)
        image = read_image(url)
        if self.max_side is not None and max(image.size) > self.max_side:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        return image


@dataclass(frozen=True)
class _Way:
    """How a codec makes a file of an image or clip and gets frames (T, H, W, 3) back, at each of its qualities."""

    qualities: tuple[float, ...]
    encode: Callable[[Any, float], bytes]
    decode: Callable[[bytes], np.ndarray]


class _Comparer:
    """Every codec at every quality on one image or clip."""

    def __init__(self, model_url: str, weights: Literal["ema", "plain"], reading: _Reading) -> None:
        self.reading = reading
        self.ways = _standard(reading.kind)
        self.ours = _ours(model_url, weights, reading.kind)
        self.anchor = _ANCHOR[reading.kind]

    def __call__(self, url: str) -> tuple[list[Point], dict[str, np.ndarray]]:
        """Its points, and what is pictured: original, ours, the anchor at the nearest size."""
        content = self.reading(url)
        original_THW3 = _frames(content)
        height, width = original_THW3.shape[1:3]
        if min(height, width) <= MS_SSIM_SIDE:
            raise ValueError(f"{url} is {width} x {height}; MS-SSIM needs sides above {MS_SSIM_SIDE} pixels")
        points: list[Point] = []
        shown = {"original": original_THW3[len(original_THW3) // 2]}
        for name, way in self.ours.items():
            point, decoded_THW3 = _measure(name, 0.0, way, content, original_THW3)
            points.append(point)
        shown[_told(point)] = decoded_THW3[len(decoded_THW3) // 2]
        rate, nearest = point.bits_per_pixel, (float("inf"), point, decoded_THW3)
        for name, way in self.ways.items():
            for quality in way.qualities:
                point, decoded_THW3 = _measure(name, quality, way, content, original_THW3)
                points.append(point)
                off = abs(float(np.log(point.bits_per_pixel / rate)))
                if name == self.anchor and off < nearest[0]:
                    nearest = (off, point, decoded_THW3)
        shown[_told(nearest[1])] = nearest[2][len(nearest[2]) // 2]
        return points, shown


def _ours(model_url: str, weights: Literal["ema", "plain"], kind: Literal["images", "clips"]) -> dict[str, _Way]:
    codec = Codec.from_pretrained(model_url, weights)
    codecs = {RAW: codec} if codec.prior is None else {RAW: Codec(codec.tokenizer), PRIOR: codec}
    way = _on_images if kind == "images" else _on_clips
    return {name: way(each) for name, each in codecs.items()}


def _on_images(codec: Codec) -> _Way:
    return _of_images((0.0,), lambda image, quality: codec.compress(image).data, codec.decompress)


def _on_clips(codec: Codec) -> _Way:
    return _Way(
        (0.0,),
        lambda clip, quality: codec.compress_clip(clip.frames_THW3, clip.rate).data,
        lambda data: np.stack(list(codec.decompress_clip(data))),
    )


def _standard(kind: Literal["images", "clips"]) -> dict[str, _Way]:
    if kind == "images":
        return {name: _of_images(each.qualities, each.encode, each.decode) for name, each in standard_codecs().items()}
    return {name: _Way(each.qualities, each.encode, each.decode) for name, each in standard_video_codecs().items()}


def _of_images(
    qualities: tuple[float, ...],
    encode: Callable[[Image.Image, float], bytes],
    decode: Callable[[bytes], Image.Image],
) -> _Way:
    return _Way(qualities, encode, lambda data: _frames(decode(data)))


def _frames(content: Content) -> np.ndarray:
    return content.frames_THW3 if isinstance(content, VideoClip) else np.asarray(content)[None]


def _measure(
    codec: str, quality: float, way: _Way, content: Content, original_THW3: np.ndarray
) -> tuple[Point, np.ndarray]:
    began = time.perf_counter()
    data = way.encode(content, quality)
    middle = time.perf_counter()
    decoded_THW3 = way.decode(data)
    ended = time.perf_counter()
    assert decoded_THW3.shape == original_THW3.shape, f"{codec} gave {decoded_THW3.shape}"
    rate = 8 * len(data) / float(np.prod(original_THW3.shape[:3]))
    return Point(
        codec, quality, rate, _figures(original_THW3, decoded_THW3), middle - began, ended - middle
    ), decoded_THW3


def _figures(original_THW3: np.ndarray, decoded_THW3: np.ndarray) -> dict[str, float]:
    """Means over frames; LPIPS over some of them."""
    frames = len(original_THW3)
    looked_at = set(np.linspace(0, frames - 1, min(frames, _LPIPS_FRAMES)).round().astype(int).tolist())
    values: Mapping[str, list[float]] = {name: [] for name in METRICS}
    for t in range(frames):
        pair = _tensor(original_THW3[t]), _tensor(decoded_THW3[t])
        values["psnr"].append(float(psnr(*pair)))
        values["ms_ssim"].append(float(multi_scale_similarity(*pair)))
        if t in looked_at:
            values["lpips"].append(float(lpips(*pair)))
    return {name: float(np.mean(each)) for name, each in values.items()}


def _tensor(pixels_HW3: np.ndarray) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(pixels_HW3)).permute(2, 0, 1)[None])


def _told(point: Point) -> str:
    return f"{point.codec}: {point.bits_per_pixel:.3f} bits/pixel, {point.figures['psnr']:.1f} dB"
