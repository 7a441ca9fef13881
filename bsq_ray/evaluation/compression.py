"""Rate and distortion of our codec beside the standard ones, on a folder of photographs.

    photograph ─every codec, every quality─▶ file ─▶ bits per pixel, PSNR, MS-SSIM, LPIPS, seconds ─▶ table and plots

Standard codecs are shown at our rate, between their two nearest qualities, and as BD-rate against JPEG.
"""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from bsq_ray import hub, storage
from bsq_ray.codec.image import Codec
from bsq_ray.data.images import DECODE_ERRORS, decode_image, to_float
from bsq_ray.data.pack import IMAGE_SUFFIXES
from bsq_ray.evaluation.codecs import standard_codecs
from bsq_ray.metrics.lpips import lpips
from bsq_ray.metrics.psnr import psnr
from bsq_ray.metrics.ssim import MS_SSIM_SIDE, structural_similarity
from bsq_ray.pool import map_in_pool

RAW, PRIOR = "BSQ, raw bits", "BSQ with prior"
_METRICS = ("psnr", "ms_ssim", "lpips")


@dataclass(frozen=True)
class Point:
    """One image in one codec at one quality."""

    codec: str
    quality: float
    bits_per_pixel: float
    figures: dict[str, float]
    encode_seconds: float
    decode_seconds: float


def evaluate_compression(
    model_url: str,
    data_url: str,
    out_url: str,
    workers: int = 2,
    address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Compresses every image of a folder with everything and writes results.json, results.md, curves.png, images.png.

    Args:
        model_url: model folder of a prior, or of a tokenizer (raw bits only).
        data_url: folder of image files.
        workers: Ray actors; 0 works in this process, without Ray.

    Returns:
        The content of results.json.

    Raises:
        ValueError: the folder holds no images that can be measured, or the model is missing.
    """
    folder = hub.read_model_folder(model_url)
    names = [name for name in storage.list_folder(data_url) if name.lower().endswith(tuple(IMAGE_SUFFIXES))]
    if not names:
        raise ValueError(f"{data_url} holds no images")
    images: dict[str, list[Point]] = {}
    pictures: list[list[np.ndarray]] = []
    urls = [storage.join(data_url, name) for name in names]
    for name, (points, shown) in zip(
        names, map_in_pool(urls, partial(_Compressor, model_url), workers, address), strict=True
    ):
        images[name] = points
        pictures.append(shown)
        progress(len(images), len(names))
    means = _means(images)
    ours = means.get(PRIOR, means[RAW])[0]
    results = {
        "model": model_url,
        "model_id": folder.id,
        "data": data_url,
        "images": len(names),
        "curves": means,
        "at_our_rate": {codec: _at_rate(points, ours["bits_per_pixel"]) for codec, points in means.items()},
        "bd_rate_against_jpeg": _bd_rates(means),
        "prior_saves": 1 - ours["bits_per_pixel"] / means[RAW][0]["bits_per_pixel"] if PRIOR in means else None,
        "per_image": {name: [point.__dict__ for point in points] for name, points in images.items()},
    }
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    storage.write_bytes(storage.join(out_url, "results.md"), (markdown(results) + "\n").encode())
    storage.write_bytes(storage.join(out_url, "curves.png"), _curves(means))
    storage.write_bytes(storage.join(out_url, "images.png"), _sheet(pictures[:6]))
    return results


class _Compressor:
    """Every codec at every quality on one image."""

    def __init__(self, model_url: str) -> None:
        codec = Codec.from_pretrained(model_url)
        self.ours = {RAW: codec} if codec.prior is None else {RAW: Codec(codec.tokenizer), PRIOR: codec}
        self.standard = standard_codecs()

    def __call__(self, url: str) -> tuple[list[Point], list[np.ndarray]]:
        """Its points, and small pictures: original, ours, JPEG of the nearest size."""
        try:
            image = decode_image(storage.read_bytes(url))
        except DECODE_ERRORS as error:
            raise RuntimeError(f"{url} cannot be read as an image") from error
        if min(image.size) <= MS_SSIM_SIDE:
            raise RuntimeError(f"{url} is {image.width} x {image.height}; MS-SSIM needs sides above {MS_SSIM_SIDE}")
        points, shown = [], [np.asarray(image)]
        for name, codec in self.ours.items():
            point, decoded = _measure(name, 0.0, image, _file_of(codec), codec.decompress)
            points.append(point)
        shown.append(np.asarray(decoded))
        rate = points[-1].bits_per_pixel
        nearest: tuple[float, Image.Image] | None = None
        for name, standard in self.standard.items():
            for quality in standard.qualities:
                point, decoded = _measure(name, quality, image, _at(standard.encode, quality), standard.decode)
                points.append(point)
                off = abs(np.log(point.bits_per_pixel / rate))
                if name == "JPEG" and (nearest is None or off < nearest[0]):
                    nearest = (off, decoded)
        assert nearest is not None
        return points, [*shown, np.asarray(nearest[1])]


def _file_of(codec: Codec) -> Callable[[Image.Image], bytes]:
    return lambda image: codec.compress(image).data


def _at(encode: Callable[[Image.Image, float], bytes], quality: float) -> Callable[[Image.Image], bytes]:
    return lambda image: encode(image, quality)


def _measure(
    codec: str,
    quality: float,
    image: Image.Image,
    encode: Callable[[Image.Image], bytes],
    decode: Callable[[bytes], Image.Image],
) -> tuple[Point, Image.Image]:
    began = time.perf_counter()
    data = encode(image)
    middle = time.perf_counter()
    decoded = decode(data)
    ended = time.perf_counter()
    original_BCHW, decoded_BCHW = _tensor(image), _tensor(decoded)
    figures = {
        "psnr": float(psnr(original_BCHW, decoded_BCHW)),
        "ms_ssim": float(structural_similarity(original_BCHW, decoded_BCHW)["ms_ssim"]),
        "lpips": float(lpips(original_BCHW, decoded_BCHW)),
    }
    rate = 8 * len(data) / (image.width * image.height)
    return Point(codec, quality, rate, figures, middle - began, ended - middle), decoded


def _tensor(image: Image.Image) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])


def _means(images: dict[str, list[Point]]) -> dict[str, list[dict[str, float]]]:
    """Mean over images of each codec at each quality, rates ascending."""
    together: dict[str, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for points in images.values():
        for point in points:
            together[point.codec][point.quality].append(point)
    curves = {}
    for codec, by_quality in together.items():
        rows = [
            {
                "quality": quality,
                "bits_per_pixel": float(np.mean([p.bits_per_pixel for p in points])),
                **{name: float(np.mean([p.figures[name] for p in points])) for name in _METRICS},
                "encode_seconds": float(np.mean([p.encode_seconds for p in points])),
                "decode_seconds": float(np.mean([p.decode_seconds for p in points])),
            }
            for quality, points in by_quality.items()
        ]
        curves[codec] = sorted(rows, key=lambda row: row["bits_per_pixel"])
    return curves


def _at_rate(points: list[dict[str, float]], rate: float) -> dict[str, float] | None:
    """Figures at a rate, by the logarithm of the rate between neighbours; None outside the measured range."""
    rates = np.log([point["bits_per_pixel"] for point in points])
    if len(points) == 1:
        return points[0]
    if not rates[0] <= np.log(rate) <= rates[-1]:
        return None
    return {
        name: float(np.interp(np.log(rate), rates, [point[name] for point in points]))
        for name in (*_METRICS, "encode_seconds", "decode_seconds")
    } | {"bits_per_pixel": rate}


def _bd_rates(means: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Bits saved (negative) or wasted at equal PSNR, in percent of JPEG's, for codecs with a curve."""
    import bjontegaard

    def curve(points: list[dict[str, float]]) -> tuple[list[float], list[float]]:
        return [p["bits_per_pixel"] for p in points], [p["psnr"] for p in points]

    anchor = curve(means["JPEG"])
    return {
        codec: float(bjontegaard.bd_rate(*anchor, *curve(points), method="akima", min_overlap=0))
        for codec, points in means.items()
        if len(points) > 3 and codec != "JPEG"
    }


def markdown(results: dict[str, Any]) -> str:
    """Every codec at our rate, and BD-rates."""
    lines = [
        "| at our rate | bits/pixel | PSNR | MS-SSIM | LPIPS | encode s | decode s | BD-rate (PSNR) against JPEG |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for codec, row in results["at_our_rate"].items():
        saved = results["bd_rate_against_jpeg"].get(codec)
        last = "–" if saved is None else f"{saved:+.1f} %"
        if row is None:
            lines.append(f"| {codec} | not within its range | | | | | | {last} |")
            continue
        cells = [f"{row[name]:.{digits}f}" for name, digits in _DIGITS.items()]
        lines.append(f"| {codec} | {' | '.join(cells)} | {last} |")
    lines += [
        "",
        f"Means over {results['images']} images of {results['data']}; sizes are whole files, headers included.",
    ]
    if results["prior_saves"] is not None:
        lines.append(f"The prior saves {results['prior_saves']:.1%} of the raw files.")
    return "\n".join(lines)


_DIGITS = {"bits_per_pixel": 4, "psnr": 2, "ms_ssim": 4, "lpips": 4, "encode_seconds": 2, "decode_seconds": 2}


def _curves(means: dict[str, list[dict[str, float]]]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"psnr": "PSNR, dB (higher is better)", "ms_ssim": "MS-SSIM (higher)", "lpips": "LPIPS, alex (lower)"}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, metric in zip(axes, _METRICS, strict=True):
        for codec, points in means.items():
            x, y = [p["bits_per_pixel"] for p in points], [p[metric] for p in points]
            ours = codec in (RAW, PRIOR)
            axis.plot(x, y, "*" if ours else "o-", markersize=14 if ours else 4, label=codec)
        axis.set(xscale="log", xlabel="bits per pixel", title=titles[metric])
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=90)
    plt.close(figure)
    return png.getvalue()


def _sheet(pictures: list[list[np.ndarray]]) -> bytes:
    """Columns of images; rows: original, ours, JPEG of the nearest size."""
    width, gap = 256, 6
    columns: list[list[Image.Image]] = []
    for stack in pictures:
        tiles = [Image.fromarray(pixels) for pixels in stack]
        columns.append([tile.resize((width, round(tile.height * width / tile.width))) for tile in tiles])
    height = max(tile.height for column in columns for tile in column)
    sheet = Image.new("RGB", (len(columns) * (width + gap) + gap, 3 * (height + gap) + gap), "white")
    for x, column in enumerate(columns):
        for y, tile in enumerate(column):
            sheet.paste(tile, (gap + x * (width + gap), gap + y * (height + gap)))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
