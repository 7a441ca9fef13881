"""How well a tokenizer gives images or clips back: every metric in one pass, over any number of workers.

    shards ─chunks─▶ Ray Data: read, resize ─▶ pool of `Measurer` actors ─▶ `Totals` ─▶ results.json, .md, .png

The driver adds up one batch after the other; no process ever holds the features of all samples. Of clips it also writes
an animation, `reconstructions.webp`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bsq_ray import config, model_folder, storage
from bsq_ray.data.data_source import DataSource
from bsq_ray.data.factory import build_pixel_source
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.stream import SkippedSamples, evaluation_blocks, evaluation_dataset
from bsq_ray.evaluation import published_results
from bsq_ray.evaluation.plots.comparison_grid import draw
from bsq_ray.evaluation.plots.frame_strips import animate, draw_strips
from bsq_ray.evaluation.provenance import contract
from bsq_ray.evaluation.reconstruction.batch_metrics import Measured, Measurer, Totals
from bsq_ray.evaluation.reconstruction.clip_metrics import ClipMeasurer
from bsq_ray.evaluation.reconstruction.image_metrics import ImageMeasurer
from bsq_ray.evaluation.tables import Column, metric_table
from bsq_ray.metrics.i3d import FEWEST_FRAMES
from bsq_ray.runtime.ray_session import gpus_per_process, ray_session

# An animation shows so many frames a second: few clips are long enough to be seen at their own speed.
_ANIMATION_FPS = 6.0


def evaluate_reconstruction(
    model_url: str,
    data_url: str,
    out_url: str,
    workers: int = 2,
    address: str | None = None,
    weights: Literal["ema", "plain"] = "ema",
    batch_size: int | None = None,
    limit: int | None = None,
    published_rows: bool = False,
    max_damaged: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measures a tokenizer on packed images or videos and writes results.json, results.md and reconstructions.png.

    Args:
        model_url: model folder.
        data_url: packed images, or packed videos for a tokenizer that takes clips.
        out_url: folder for the results.
        workers: Ray actors that measure; 0 measures in this process, without Ray.
        weights: "ema" or "plain" weights of the folder.
        batch_size: images or clips at once; by default 32 images or 2 clips.
        limit: only the first so many images or clips.
        published_rows: show published figures below the table.
        max_damaged: images or clips that may be unreadable.
        progress: called with images or clips done and all of them.

    Returns:
        The content of results.json: {"rows": {"model": {...}, "mean colour": {...}}, "contract": {...}, …}; of clips
        also {"by_frame": {"model": {"psnr": [first frame, second frame, …], …}, …}}.

    Raises:
        ValueError: model or data are missing or do not fit.
        RuntimeError: more images than allowed cannot be read.
    """
    folder = model_folder.load_model_folder(model_url, weights)
    run = config.expect(folder.config, config.TokenizerConfig, model_url)
    manifest = read_manifest(data_url)
    source = build_pixel_source(run, manifest)
    batch_size = batch_size or _BATCHES[manifest.kind]
    total = source.num_samples if limit is None else min(source.num_samples, limit)
    if total < 2:
        raise ValueError(f"{data_url} has {total} {_UNITS[manifest.kind]}; measuring needs at least 2")
    job = _Job(run, folder.model_id, model_url, weights, manifest, source, batch_size, total)
    totals, damage = Totals(run.model.quantizer.bits, job.measurer), SkippedSamples(max_damaged)
    parts = _in_this_process(job) if workers == 0 else _on_ray(job, workers, address)
    for part in parts:
        damage.add(part.damaged)
        totals.add(part)
        progress(totals.samples + len(totals.damaged), total)
    return _conclude(totals, job, out_url, published_rows)


@dataclass(frozen=True)
class _Job:
    run: config.TokenizerConfig
    model_id: str
    model_url: str
    weights: Literal["ema", "plain"]
    manifest: Manifest
    source: DataSource
    batch_size: int
    total: int

    @property
    def section(self) -> config.TokenizerModel:
        return self.run.model

    @property
    def measurer(self) -> type[Measurer]:
        return ImageMeasurer if self.manifest.kind == "images" else ClipMeasurer

    def measure(self) -> Measurer:
        return self.measurer(self.model_url, self.weights, self.total)

    def samples(self) -> tuple[DataSource, int, int]:
        """What is read: arguments of `evaluation_blocks` and `evaluation_dataset`."""
        return self.source, self.batch_size, self.total


def _in_this_process(job: _Job) -> Iterator[Measured]:
    yield from map(job.measure(), evaluation_blocks(*job.samples()))


def _on_ray(job: _Job, workers: int, address: str | None) -> Iterator[Measured]:
    with ray_session(address):
        import ray

        class Worker:
            def __init__(self) -> None:
                self.measure = job.measure()

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                measured = np.empty(1, object)
                measured[0] = self.measure(rows["block"][0])
                return {"measured": measured}

        share = gpus_per_process(workers)
        samples = evaluation_dataset(*job.samples())
        pool = ray.data.ActorPoolStrategy(size=min(workers, -(-job.total // job.batch_size)))
        for row in samples.map_batches(Worker, batch_size=1, compute=pool, num_cpus=1, num_gpus=share).iter_rows():
            yield row["measured"]


def _conclude(totals: Totals, job: _Job, out_url: str, published_rows: bool) -> dict[str, Any]:
    if totals.samples < 2:
        what = f"{job.total} {_UNITS[job.manifest.kind]}"
        raise RuntimeError(f"only {totals.samples} of {what} of {job.manifest.url} can be read")
    model, data = job.section, job.run.data
    figures = totals.compute()
    for row_figures in figures.values():
        row_figures["bits_per_pixel"] = model.quantizer.bits / model.patch_size**2
    frames = model.frames if job.manifest.kind == "videos" else 1
    unit = "frames_per_second" if job.manifest.kind == "videos" else "images_per_second"
    figures["model"][unit] = figures["model"].pop("samples_per_second") * frames
    terms = contract(job.manifest, totals.samples, model.image_size, data.evaluation_filter, job.measurer.networks)
    results: dict[str, Any] = {
        "model": job.model_url,
        "model_id": job.model_id,
        "weights": job.weights,
        "rows": figures,
        "bit_entropies": totals.usage.bit_entropies(),
        "damaged": totals.damaged,
        "contract": terms,
    }
    if "ms_ssim" not in figures["model"]:
        terms["ms_ssim"] = f"not defined for images of {model.image_size} px (sides must be above 160)"
    if job.manifest.kind == "videos":
        terms["clips"] = (
            f"{frames} frames, {_taken(data.frame_stride)} of the video; "
            f"at most {data.clips_per_video} of a video, from the middles of equal parts"
        )
        terms["left_out"] = list(job.source.notes)
        if "rfvd" not in figures["model"]:
            terms["rfvd"] = f"not defined for clips of {frames} frames (its network takes {FEWEST_FRAMES} or more)"
        results["by_frame"] = totals.by_frame()
        pictures = {
            "reconstructions.png": draw_strips(totals.comparisons, totals.scores),
            "reconstructions.webp": animate(totals.comparisons, totals.scores, _ANIMATION_FPS),
        }
    else:
        pictures = {"reconstructions.png": draw(totals.comparisons, totals.scores)}
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    table = (
        markdown(results) + ("\n\n" + published_results.markdown(job.manifest.kind) if published_rows else "") + "\n"
    )
    storage.write_bytes(storage.join(out_url, "results.md"), table.encode())
    for name, picture in pictures.items():
        storage.write_bytes(storage.join(out_url, name), picture)
    return results


_BATCHES = {"images": 32, "videos": 2}
_UNITS = {"images": "images", "videos": "clips"}


def _taken(stride: int) -> str:
    ending = "th" if 10 < stride % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(stride % 10, "th")
    return f"every {stride}{ending} one" if stride > 1 else "every one"


COLUMNS: dict[str, Column] = {
    "bits_per_pixel": ("bits/pixel", 4, None),
    "psnr": ("PSNR", 2, max),
    "psnr_clip": ("PSNR (whole clips)", 2, max),
    "ssim": ("SSIM", 4, max),
    "ms_ssim": ("MS-SSIM", 4, max),
    "lpips": ("LPIPS (alex)", 4, min),
    "lpips_vgg": ("LPIPS (vgg)", 4, min),
    "rfid": ("rFID", 2, min),
    "kid": ("KID", 4, min),
    "rfvd": ("rFVD", 1, min),
    "flicker": ("flicker", 2, min),
    "code_usage": ("codes used", 4, None),
    "bit_entropy": ("bit entropy", 3, None),
    "images_per_second": ("images/s", 1, None),
    "frames_per_second": ("frames/s", 1, None),
}


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table, the better value of each column in bold, and the contract below it."""
    lines = metric_table(results["rows"], COLUMNS)
    terms = results["contract"]
    data = f"{terms['data']} ({terms['data_hash'][:12]})"
    lines += ["", f"{terms['images']} {_UNITS[terms['kind']]} of {data}, {terms['resize']}; {terms['pixels']}."]
    lines += [f"Clips: {terms['clips']}."] if "clips" in terms else []
    lines += [f"Left out: {note}." for note in terms.get("left_out", ())]
    if "warning" in terms:
        lines.append(f"Note: {terms['warning']}.")
    return "\n".join(lines)
