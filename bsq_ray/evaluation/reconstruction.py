"""How well a tokenizer gives images back: every metric in one pass, over any number of workers.

    shards ─worker r's part─▶ originals ─tokenizer─▶ reconstructions ─▶ metric states ─merged─▶ results
                                        ─mean colours─▶ the trivial codec at the same bits, as a second row

Workers return metric states and a few pictures, never lists of features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bsq_ray import config, hub, storage
from bsq_ray.data.images import to_float, to_uint8
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.stream import Damage, evaluation_batches
from bsq_ray.evaluation import published
from bsq_ray.evaluation.baseline import MeanColourCodec
from bsq_ray.evaluation.contract import contract
from bsq_ray.evaluation.pictures import Comparison, draw, keep
from bsq_ray.metrics.fid import FeatureStatistics, frechet_distance, kernel_distance
from bsq_ray.metrics.inception import Inception
from bsq_ray.metrics.lpips import LPIPS
from bsq_ray.metrics.psnr import PSNR
from bsq_ray.metrics.ssim import SSIM
from bsq_ray.models.quantizers.usage import CodeUsage
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.session import ray_session

NETWORKS = ["lpips-alex", "lpips-vgg", "fid-inception"]
ROWS = ("model", "mean colour")


@dataclass
class _Part:
    """What one worker measured: plain data, so that it can travel."""

    states: dict[str, dict[str, dict[str, np.ndarray]]]
    usage: dict[str, np.ndarray]
    originals: dict[str, np.ndarray]
    comparisons: list[Comparison]
    scores: list[float]
    seconds: float
    images: int
    damaged: list[str] = field(default_factory=list)


def evaluate_reconstruction(
    model_url: str,
    data_url: str,
    out_url: str,
    workers: int = 2,
    address: str | None = None,
    weights: Literal["ema", "plain"] = "ema",
    batch_size: int = 32,
    limit: int | None = None,
    published_rows: bool = False,
    max_damaged: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measures a tokenizer on packed images and writes results.json, results.md and reconstructions.png.

    Args:
        model_url: model folder.
        data_url: packed images.
        out_url: folder for the results.
        workers: Ray workers; 0 measures in this process, without Ray.
        weights: "ema" or "plain" weights of the folder.
        limit: only the first so many images.
        published_rows: show published figures below the table.
        max_damaged: images that may be unreadable.
        progress: called with workers done and all workers.

    Returns:
        The content of results.json: {"rows": {"model": {...}, "mean colour": {...}}, "contract": {...}, …}.

    Raises:
        ValueError: model or data are missing or do not fit.
    """
    folder = hub.read_model_folder(model_url, weights)
    manifest = read_manifest(data_url)
    total = manifest.samples if limit is None else min(manifest.samples, limit)
    if total < 2:
        raise ValueError(f"{data_url} has {total} images; measuring needs at least 2")
    job = _Job(model_url, weights, manifest, batch_size, limit, max_damaged)
    if workers == 0:
        parts = [_measure(job, 0, 1)]
        progress(1, 1)
    else:
        parts = _on_ray(job, workers, address, progress)
    return _conclude(parts, folder, manifest, out_url, model_url, weights, published_rows)


@dataclass(frozen=True)
class _Job:
    model_url: str
    weights: Literal["ema", "plain"]
    manifest: Manifest
    batch_size: int
    limit: int | None
    max_damaged: int


def _on_ray(job: _Job, workers: int, address: str | None, progress: Callable[[int, int], None]) -> list[_Part]:
    with ray_session(address):
        import ray

        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus)(_measure)
        references = [task.remote(job, rank, workers) for rank in range(workers)]
        waiting = list(references)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=1)
            progress(workers - len(waiting), workers)
        parts: list[_Part] = ray.get(references)
        return parts


def _measure(job: _Job, rank: int, world: int) -> _Part:
    """One worker's part of the data set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_pretrained(job.model_url, job.weights).to(device)
    section = tokenizer.config
    run = hub.read_model_folder(job.model_url, job.weights).config
    codec = MeanColourCodec(section.patch_size, section.quantizer.bits)
    inception = Inception().to(device)
    rows = {name: _Row(device, inception) for name in ROWS}
    originals, usage = FeatureStatistics(), CodeUsage(section.quantizer.bits)
    damage = Damage(job.max_damaged)
    comparisons: list[Comparison] = []
    scores: list[float] = []
    seconds, images = 0.0, 0
    batches = evaluation_batches(
        job.manifest, section.image_size, run.data.evaluation_filter, job.batch_size, rank, world, job.limit, damage
    )
    for batch in batches:
        original_BCHW = to_float(batch.images_BCHW.to(device))
        began = time.perf_counter()
        tokens = tokenizer.encode(original_BCHW)
        decoded_BCHW = tokenizer.decode(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        usage.update(tokens.bits_BNL)
        model_BCHW = to_float(to_uint8(decoded_BCHW))
        trivial_BCHW = to_float(to_uint8(codec.reconstruct(original_BCHW)))
        figures = [
            rows[name].update(original_BCHW, decoded_BCHW, batch.keys)
            for name, decoded_BCHW in zip(ROWS, (model_BCHW, trivial_BCHW), strict=True)
        ]
        originals.update(inception(original_BCHW).cpu().numpy(), batch.keys)
        for place, key in enumerate(batch.keys):
            triple = (original_BCHW[place], model_BCHW[place], trivial_BCHW[place])
            pixels = np.stack([to_uint8(image).cpu().numpy() for image in triple])
            lpips, psnr = ([float(row[n][place]) for row in figures] for n in ("lpips", "psnr"))
            comparisons.append(Comparison(key, pixels, lpips, psnr))
        scores += figures[0]["lpips"].tolist()
        comparisons = keep(comparisons)
        images += len(batch.keys)
    states = {name: row.states() for name, row in rows.items()}
    return _Part(states, usage.state(), originals.state(), comparisons, scores, seconds, images, damage.found)


class _Row:
    """The metrics of one way to reconstruct."""

    def __init__(self, device: torch.device | str, inception: Inception | None) -> None:
        self.psnr, self.ssim, self.features = PSNR(), SSIM(), FeatureStatistics()
        self.lpips, self.lpips_vgg = LPIPS("alex", device), LPIPS("vgg", device)
        self.inception = inception

    def update(self, original_BCHW: Tensor, reconstruction_BCHW: Tensor, keys: list[str]) -> dict[str, Tensor]:
        """Adds a batch; PSNR and LPIPS of each image."""
        assert self.inception is not None
        self.ssim.update(original_BCHW, reconstruction_BCHW)
        self.lpips_vgg.update(original_BCHW, reconstruction_BCHW)
        self.features.update(self.inception(reconstruction_BCHW).cpu().numpy(), keys)
        return {
            "psnr": self.psnr.update(original_BCHW, reconstruction_BCHW),
            "lpips": self.lpips.update(original_BCHW, reconstruction_BCHW),
        }

    def states(self) -> dict[str, dict[str, np.ndarray]]:
        return {name: getattr(self, name).state() for name in _METRICS}

    def merge(self, states: dict[str, dict[str, np.ndarray]]) -> None:
        for name, state in states.items():
            getattr(self, name).merge(state)

    def compute(self, originals: FeatureStatistics) -> dict[str, float]:
        figures = self.psnr.compute() | self.ssim.compute() | self.lpips.compute() | self.lpips_vgg.compute()
        figures["rfid"] = frechet_distance(originals, self.features)
        figures["kid"] = kernel_distance(originals.kept(), self.features.kept())
        return figures


_METRICS = ("psnr", "ssim", "lpips", "lpips_vgg", "features")


def _conclude(
    parts: list[_Part],
    folder: hub.ModelFolder,
    manifest: Manifest,
    out_url: str,
    model_url: str,
    weights: str,
    published_rows: bool,
) -> dict[str, Any]:
    model: config.TokenizerModel = folder.config.model
    originals, usage = FeatureStatistics(), CodeUsage(model.quantizer.bits)
    rows = {name: _Row("cpu", None) for name in ROWS}
    comparisons: list[Comparison] = []
    scores = [score for part in parts for score in part.scores]
    for part in parts:
        if part.images == 0:
            continue
        originals.merge(part.originals)
        usage.merge(part.usage)
        comparisons += part.comparisons
        for name, row in rows.items():
            row.merge(part.states[name])
    images = sum(part.images for part in parts)
    figures = {name: row.compute(originals) for name, row in rows.items()}
    bits_per_pixel = model.quantizer.bits / model.patch_size**2
    for row_figures in figures.values():
        row_figures["bits_per_pixel"] = bits_per_pixel
    figures["model"] |= usage.compute() | {"images_per_second": images / sum(part.seconds for part in parts)}
    results: dict[str, Any] = {
        "model": model_url,
        "model_id": folder.id,
        "weights": weights,
        "rows": figures,
        "bit_entropies": usage.bit_entropies(),
        "damaged": [line for part in parts for line in part.damaged],
        "contract": contract(manifest, images, model.image_size, folder.config.data.evaluation_filter, NETWORKS),
    }
    if model.image_size <= 160:
        results["contract"]["ms_ssim"] = f"not defined for images of {model.image_size} px (sides must be above 160)"
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    table = markdown(results) + ("\n\n" + published.markdown() if published_rows else "") + "\n"
    storage.write_bytes(storage.join(out_url, "results.md"), table.encode())
    storage.write_bytes(storage.join(out_url, "reconstructions.png"), draw(keep(comparisons), scores))
    return results


COLUMNS = {
    "bits_per_pixel": ("bits/pixel", 4, None),
    "psnr": ("PSNR", 2, max),
    "ssim": ("SSIM", 4, max),
    "ms_ssim": ("MS-SSIM", 4, max),
    "lpips": ("LPIPS (alex)", 4, min),
    "lpips_vgg": ("LPIPS (vgg)", 4, min),
    "rfid": ("rFID", 2, min),
    "kid": ("KID", 4, min),
    "code_usage": ("codes used", 4, None),
    "bit_entropy": ("bit entropy", 3, None),
    "images_per_second": ("images/s", 1, None),
}


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table, the better value of each column in bold, and the contract below it."""
    rows = results["rows"]
    shown = {key: spec for key, spec in COLUMNS.items() if any(key in figures for figures in rows.values())}
    lines = ["| | " + " | ".join(spec[0] for spec in shown.values()) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, figures in rows.items():
        cells = []
        for key, (_, digits, better) in shown.items():
            values = [other[key] for other in rows.values() if key in other]
            text = f"{figures[key]:.{digits}f}" if key in figures else "–"
            best = better is not None and key in figures and len(values) > 1 and figures[key] == better(values)
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    terms = results["contract"]
    data = f"{terms['data']} ({terms['data_hash'][:12]})"
    lines += ["", f"{terms['images']} images of {data}, {terms['resize']}; {terms['pixels']}."]
    if "warning" in terms:
        lines.append(f"Note: {terms['warning']}.")
    return "\n".join(lines)
