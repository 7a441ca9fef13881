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
from bsq_ray.evaluation.plots.comparison_grid import render_grid
from bsq_ray.evaluation.plots.frame_strips import render_animation, render_strips
from bsq_ray.evaluation.provenance import collect_provenance
from bsq_ray.evaluation.reconstruction.batch_metrics import BatchMetrics, MetricAccumulator, ReconstructionMetrics
from bsq_ray.evaluation.reconstruction.clip_metrics import ClipReconstructionMetrics
from bsq_ray.evaluation.reconstruction.image_metrics import ImageReconstructionMetrics
from bsq_ray.evaluation.tables import Column, metric_table
from bsq_ray.metrics.i3d import MIN_FRAMES
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
    show_published: bool = False,
    max_skipped_samples: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
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
    run = config.require_stage(folder.config, config.TokenizerConfig, model_url)
    manifest = read_manifest(data_url)
    source = build_pixel_source(run, manifest)
    batch_size = batch_size or _DEFAULT_BATCH_SIZES[manifest.kind]
    total = source.num_samples if limit is None else min(source.num_samples, limit)
    if total < 2:
        raise ValueError(f"{data_url} has {total} {_UNITS[manifest.kind]}; measuring needs at least 2")
    task = _EvaluationTask(run, folder.model_id, model_url, weights, manifest, source, batch_size, total)
    accumulator, skipped_samples = (
        MetricAccumulator(run.model.quantizer.bits, task.metrics_type),
        SkippedSamples(max_skipped_samples),
    )
    batches = _run_locally(task) if workers == 0 else _run_on_ray(task, workers, address)
    for batch in batches:
        skipped_samples.add(batch.skipped)
        accumulator.update(batch)
        on_progress(accumulator.num_samples + len(accumulator.skipped), total)
    return _write_results(accumulator, task, out_url, show_published)


@dataclass(frozen=True)
class _EvaluationTask:
    run: config.TokenizerConfig
    model_id: str
    model_url: str
    weights: Literal["ema", "plain"]
    manifest: Manifest
    source: DataSource
    batch_size: int
    total: int

    @property
    def model_config(self) -> config.TokenizerModelConfig:
        return self.run.model

    @property
    def metrics_type(self) -> type[ReconstructionMetrics]:
        return ImageReconstructionMetrics if self.manifest.kind == "images" else ClipReconstructionMetrics

    def build_metrics(self) -> ReconstructionMetrics:
        return self.metrics_type(self.model_url, self.weights, self.total)

    def dataset_args(self) -> tuple[DataSource, int, int]:
        """What is read: arguments of `evaluation_blocks` and `evaluation_dataset`."""
        return self.source, self.batch_size, self.total


def _run_locally(task: _EvaluationTask) -> Iterator[BatchMetrics]:
    yield from map(task.build_metrics(), evaluation_blocks(*task.dataset_args()))


def _run_on_ray(task: _EvaluationTask, workers: int, address: str | None) -> Iterator[BatchMetrics]:
    with ray_session(address):
        import ray

        class MetricsActor:
            def __init__(self) -> None:
                self.measure = task.build_metrics()

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                measured = np.empty(1, object)
                measured[0] = self.measure(rows["block"][0])
                return {"measured": measured}

        gpus_per_actor = gpus_per_process(workers)
        samples = evaluation_dataset(*task.dataset_args())
        pool = ray.data.ActorPoolStrategy(size=min(workers, -(-task.total // task.batch_size)))
        for row in samples.map_batches(
            MetricsActor, batch_size=1, compute=pool, num_cpus=1, num_gpus=gpus_per_actor
        ).iter_rows():
            yield row["measured"]


def _write_results(
    accumulator: MetricAccumulator, task: _EvaluationTask, out_url: str, show_published: bool
) -> dict[str, Any]:
    if accumulator.num_samples < 2:
        what = f"{task.total} {_UNITS[task.manifest.kind]}"
        raise RuntimeError(f"only {accumulator.num_samples} of {what} of {task.manifest.url} can be read")
    model, data = task.model_config, task.run.data
    metrics = accumulator.compute()
    for row_metrics in metrics.values():
        row_metrics["bits_per_pixel"] = model.quantizer.bits / model.patch_size**2
    num_frames = model.frames if task.manifest.kind == "videos" else 1
    unit = "frames_per_second" if task.manifest.kind == "videos" else "images_per_second"
    metrics["model"][unit] = metrics["model"].pop("samples_per_second") * num_frames
    provenance = collect_provenance(
        task.manifest, accumulator.num_samples, model.image_size, data.eval_interpolation, task.metrics_type.networks
    )
    results: dict[str, Any] = {
        "model": task.model_url,
        "model_id": task.model_id,
        "weights": task.weights,
        "rows": metrics,
        "bit_entropies": accumulator.usage.bit_entropies(),
        "damaged": accumulator.skipped,
        "contract": provenance,
    }
    if "ms_ssim" not in metrics["model"]:
        provenance["ms_ssim"] = f"not defined for images of {model.image_size} px (sides must be above 160)"
    if task.manifest.kind == "videos":
        provenance["clips"] = (
            f"{num_frames} frames, {_format_stride(data.frame_stride)} of the video; "
            f"at most {data.clips_per_video} of a video, from the middles of equal parts"
        )
        provenance["left_out"] = list(task.source.notes)
        if "rfvd" not in metrics["model"]:
            provenance["rfvd"] = (
                f"not defined for clips of {num_frames} frames (its network takes {MIN_FRAMES} or more)"
            )
        results["by_frame"] = accumulator.per_frame()
        plots = {
            "reconstructions.png": render_strips(accumulator.comparisons, accumulator.lpips_scores),
            "reconstructions.webp": render_animation(accumulator.comparisons, accumulator.lpips_scores, _ANIMATION_FPS),
        }
    else:
        plots = {"reconstructions.png": render_grid(accumulator.comparisons, accumulator.lpips_scores)}
    storage.write_bytes(storage.join(out_url, "results.json"), json.dumps(results, indent=1).encode())
    table = (
        reconstruction_markdown(results)
        + ("\n\n" + published_results.published_markdown(task.manifest.kind) if show_published else "")
        + "\n"
    )
    storage.write_bytes(storage.join(out_url, "results.md"), table.encode())
    for name, content in plots.items():
        storage.write_bytes(storage.join(out_url, name), content)
    return results


_DEFAULT_BATCH_SIZES = {"images": 32, "videos": 2}
_UNITS = {"images": "images", "videos": "clips"}


def _format_stride(stride: int) -> str:
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


def reconstruction_markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table, the better value of each column in bold, and the contract below it."""
    lines = metric_table(results["rows"], COLUMNS)
    provenance = results["contract"]
    data = f"{provenance['data']} ({provenance['data_hash'][:12]})"
    lines += [
        "",
        f"{provenance['images']} {_UNITS[provenance['kind']]} of {data}, {provenance['resize']}; {provenance['pixels']}.",
    ]
    lines += [f"Clips: {provenance['clips']}."] if "clips" in provenance else []
    lines += [f"Left out: {note}." for note in provenance.get("left_out", ())]
    if "warning" in provenance:
        lines.append(f"Note: {provenance['warning']}.")
    return "\n".join(lines)
