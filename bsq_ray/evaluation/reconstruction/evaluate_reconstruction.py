"""Evaluate the reconstructions of a tokenizer: all metrics in one pass over the data, with any number of workers.

    shards ─chunks─▶ Ray Data: read, resize ─▶ pool of `ReconstructionMetrics` actors ─features, metrics of batches─┐
        results.json, results.md, plots ◀─ `MetricAccumulator` of the driver ◀─sums─ `MetricAccumulator`s in tasks ◀┘

Tasks on all nodes sum the metrics of many batches, and the driver adds their sums, so no process limits the number of
workers or stores the features of all samples. For clips the driver also writes an animation, `reconstructions.webp`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from bsq_ray.metrics.fid import KID_SUBSET_SIZE
from bsq_ray.metrics.i3d import MIN_FRAMES
from bsq_ray.metrics.lpips import MIN_SIDE
from bsq_ray.metrics.ssim import MS_SSIM_SIDE
from bsq_ray.model_folder import WeightsKind
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress
from bsq_ray.runtime.ray_session import gpus_per_process, ray_session

# Frame rate of the animation; most clips are too short to watch at their original rate.
_ANIMATION_FPS = 6.0
# The sums of a part are 150 MB for images, as much as the features of 6,000 images.
_MIN_PARTS, _MAX_BATCHES_PER_PART = 16, 256


def evaluate_reconstruction(
    model_url: str,
    data_url: str,
    out_url: str,
    *,
    workers: int = 2,
    address: str | None = None,
    weights: WeightsKind = "ema",
    batch_size: int | None = None,
    limit: int | None = None,
    show_published: bool = False,
    max_skipped_samples: int = 0,
    bits: Sequence[int] = (),
    cut_bits: Sequence[int] = (),
    flip_rates: Sequence[float] = (),
    on_progress: ProgressCallback = no_progress,
) -> dict[str, Any]:
    """Measure a tokenizer on packed images or videos; write results.json, results.md and reconstructions.png.

    Args:
        model_url: model folder.
        data_url: packed images, or packed videos for a video tokenizer.
        out_url: folder for the results.
        workers: number of Ray actors; 0 evaluates in this process, without Ray.
        address: Ray cluster, see `ray_session`.
        weights: "ema" or "raw" weights of the folder.
        batch_size: images or clips per forward pass; None is 32 images or 2 clips.
        limit: evaluate only the first images or clips, at most this number; None for all.
        show_published: append published results to results.md.
        max_skipped_samples: number of unreadable images or clips that may be skipped.
        bits: numbers of bits per token that a tokenizer with nested bits is also measured at, each in a row "k bits".
        cut_bits: numbers of bits that an ordinary tokenizer is also measured at, as a baseline for nested bits: its
            tokens are cut, which its decoder was not trained for. Each has a row "cut to k bits".
        flip_rates: probabilities with which each bit is flipped before decoding, each in a row "p % of bits flipped".
            The flips depend on the keys of the samples, not on the number of workers.
        on_progress: called with the finished and the total number of images or clips.

    Returns:
        The content of results.json: {"rows": {"model": {...}, "mean color": {...}}, "provenance": {...}, …}; for clips
        also {"per_frame": {"model": {"psnr": [first frame, second frame, …], …}, …}}.

    Raises:
        ValueError: the model or the data does not exist, or they do not match; or the tokenizer has fewer bits, or no
            nested bits.
        RuntimeError: more than `max_skipped_samples` samples cannot be read.
    """
    # Actors may have another working folder.
    model_url, data_url, out_url = model_folder.absolute_url(model_url), *map(storage.absolute, (data_url, out_url))
    folder = model_folder.load_model_folder(model_url, weights)
    run_config = config.require_stage(folder.config, config.TokenizerConfig, model_url)
    bits_of_rows = _bits_of_rows(run_config.model.quantizer, bits, cut_bits)
    flips_of_rows = _flips_of_rows(run_config.model.quantizer, flip_rates)
    manifest = read_manifest(data_url)
    source = build_pixel_source(run_config, manifest)
    batch_size = batch_size or _DEFAULT_BATCH_SIZES[manifest.kind]
    total = source.num_samples if limit is None else min(source.num_samples, limit)
    if total < 2:
        raise ValueError(f"{data_url} has {total} {_UNITS[manifest.kind]}; an evaluation needs at least 2")
    if run_config.model.image_size < MIN_SIDE["alex"]:
        size = run_config.model.image_size
        raise ValueError(
            f"{model_url} has images of {size} x {size} pixels; measuring needs {MIN_SIDE['alex']} or more, because "
            "LPIPS is not defined for smaller ones"
        )
    task = _EvaluationTask(
        run_config,
        folder.model_id,
        model_url,
        weights,
        manifest,
        source,
        batch_size,
        total,
        bits_of_rows,
        flips_of_rows,
    )
    accumulator = task.make_accumulator()
    skipped_samples = SkippedSamples(max_skipped_samples)
    for part in _run_locally(task) if workers == 0 else _run_on_ray(task, workers, address):
        skipped_samples.add(part.skipped)
        accumulator.merge(part)
        on_progress(accumulator.num_samples + len(accumulator.skipped), total)
    return _write_results(accumulator, task, out_url, show_published)


def _bits_of_rows(
    quantizer_config: config.QuantizerConfig, bits: Sequence[int], cut_bits: Sequence[int]
) -> dict[str, int]:
    """Return the number of bits of each row that decodes fewer bits than the tokenizer has.

    Raises:
        ValueError: the tokenizer has fewer bits, no nested bits, or no codes that can be cut.
    """
    if not bits and not cut_bits:
        return {}
    if not isinstance(quantizer_config, config.BSQConfig | config.LFQConfig):
        raise ValueError(f"tokens of a {quantizer_config.kind} quantizer cannot be cut; use a BSQ or LFQ tokenizer")
    if bits and not quantizer_config.keep:
        raise ValueError(
            "the tokenizer has no nested bits (model.quantizer.keep); measure it with cut_bits (--cut-bits), a "
            "baseline that it was not trained for"
        )
    wrong = [number for number in (*bits, *cut_bits) if not 1 <= number < quantizer_config.bits]
    if wrong:
        raise ValueError(
            f"cannot measure {wrong[0]} of {quantizer_config.bits} bits; use 1 to {quantizer_config.bits - 1}, all "
            "bits are measured anyway"
        )
    return {f"{number} bits": number for number in bits} | {f"cut to {number} bits": number for number in cut_bits}


def _flips_of_rows(quantizer_config: config.QuantizerConfig, flip_rates: Sequence[float]) -> dict[str, float]:
    """Return the flip probability of each row that decodes flipped bits.

    Raises:
        ValueError: a rate is out of range, or flipped bits may be no code of the quantizer.
    """
    if flip_rates and not isinstance(quantizer_config, config.BSQConfig | config.LFQConfig):
        raise ValueError(
            f"bits of the quantizer {quantizer_config.kind} are no signs, so flipping one may give no code at all; "
            "evaluate a tokenizer with quantizer bsq or lfq, or leave out the flips"
        )
    for rate in flip_rates:
        if not 0 < rate <= 1:
            raise ValueError(f"flip rate {rate:g} is not a probability above 0; use values such as 0.02,0.05,0.1")
    return {f"{100 * rate:g} % of bits flipped": rate for rate in flip_rates}


@dataclass(frozen=True)
class _EvaluationTask:
    """Model, data and options of one evaluation.

    Attributes:
        total: number of images or clips to evaluate.
        bits_of_rows: number of bits of each row that decodes fewer bits than the tokenizer has.
        flips_of_rows: flip probability of each row that decodes flipped bits.
    """

    run_config: config.TokenizerConfig
    model_id: str
    model_url: str
    weights: WeightsKind
    manifest: Manifest
    source: DataSource
    batch_size: int
    total: int
    bits_of_rows: Mapping[str, int]
    flips_of_rows: Mapping[str, float]

    @property
    def model_config(self) -> config.TokenizerModelConfig:
        return self.run_config.model

    @property
    def metrics_type(self) -> type[ReconstructionMetrics]:
        return ImageReconstructionMetrics if self.manifest.kind == "images" else ClipReconstructionMetrics

    def build_metrics(self) -> ReconstructionMetrics:
        return self.metrics_type(self.model_url, self.weights, self.total, self.bits_of_rows, self.flips_of_rows)

    def make_accumulator(self) -> MetricAccumulator:
        further_rows = (*self.bits_of_rows, *self.flips_of_rows)
        return MetricAccumulator(self.model_config.quantizer.bits, self.metrics_type, further_rows)

    def accumulate(self, batches: Iterable[BatchMetrics]) -> MetricAccumulator:
        accumulator = self.make_accumulator()
        for batch in batches:
            accumulator.update(batch)
        return accumulator

    @property
    def num_batches(self) -> int:
        return -(-self.total // self.batch_size)

    def dataset_args(self) -> tuple[DataSource, int, int]:
        """Return the arguments of `evaluation_blocks` and `evaluation_dataset`."""
        return self.source, self.batch_size, self.total


def _run_locally(task: _EvaluationTask) -> Iterator[MetricAccumulator]:
    compute_metrics = task.build_metrics()
    for block in evaluation_blocks(*task.dataset_args()):
        yield task.accumulate([compute_metrics(block)])


def _run_on_ray(task: _EvaluationTask, workers: int, address: str | None) -> Iterator[MetricAccumulator]:
    with ray_session(address):
        import ray

        class MetricsActor:
            def __init__(self) -> None:
                self.compute_metrics = task.build_metrics()

            def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
                batch_metrics = np.empty(1, object)
                batch_metrics[0] = self.compute_metrics(rows["block"][0])
                return {"batch_metrics": batch_metrics}

        def accumulate(rows: dict[str, Any]) -> dict[str, Any]:
            part = np.empty(1, object)
            part[0] = task.accumulate(rows["batch_metrics"])
            return {"part": part}

        # Enough parts for the progress display, and few enough for one process to add.
        batches_per_part = min(max(1, task.num_batches // _MIN_PARTS), _MAX_BATCHES_PER_PART)
        gpus_per_actor = gpus_per_process(workers)
        samples = evaluation_dataset(*task.dataset_args())
        pool = ray.data.ActorPoolStrategy(size=min(workers, task.num_batches))
        batches = samples.map_batches(MetricsActor, batch_size=1, compute=pool, num_cpus=1, num_gpus=gpus_per_actor)
        for row in batches.map_batches(accumulate, batch_size=batches_per_part).iter_rows():
            yield row["part"]


def _write_results(
    accumulator: MetricAccumulator, task: _EvaluationTask, out_url: str, show_published: bool
) -> dict[str, Any]:
    """Write results.json, results.md and the plots; return the content of results.json."""
    if accumulator.num_samples < 2:
        expected = f"{task.total} {_UNITS[task.manifest.kind]}"
        raise RuntimeError(f"only {accumulator.num_samples} of {expected} of {task.manifest.url} could be read")
    model, is_video = task.model_config, task.manifest.kind == "videos"
    metrics = accumulator.compute()
    for row, row_metrics in metrics.items():
        row_metrics["bits_per_pixel"] = task.bits_of_rows.get(row, model.quantizer.bits) / model.patch_size**2
    unit, num_frames = ("frames_per_second", model.frames) if is_video else ("images_per_second", 1)
    metrics["model"][unit] = metrics["model"].pop("samples_per_second") * num_frames
    results: dict[str, Any] = {
        "model": task.model_url,
        "model_id": task.model_id,
        "weights": task.weights,
        "rows": metrics,
        "bit_entropies": accumulator.usage.bit_entropies(),
        "skipped_samples": accumulator.skipped,
        "provenance": _provenance(accumulator.num_samples, metrics["model"], task),
    }
    if is_video:
        results["per_frame"] = accumulator.per_frame()
    storage.write_text(storage.join(out_url, "results.json"), json.dumps(results, indent=1))
    table = reconstruction_markdown(results) + "\n"
    if show_published:
        table += "\n" + published_results.published_markdown(task.manifest.kind) + "\n"
    storage.write_text(storage.join(out_url, "results.md"), table)
    for name, content in _render_plots(accumulator, is_video).items():
        storage.write_bytes(storage.join(out_url, name), content)
    return results


def _provenance(num_samples: int, metrics: Mapping[str, float], task: _EvaluationTask) -> dict[str, Any]:
    """Return the provenance, with notes about KID, the selection of clips, and metrics without a value."""
    model, data = task.model_config, task.run_config.data
    provenance = collect_provenance(
        task.manifest,
        num_samples,
        size=model.image_size,
        resize_filter=data.eval_interpolation,
        networks=task.metrics_type.networks,
    )
    if "kid" in metrics:
        provenance["kid"] = (
            f"U-statistic over {min(num_samples, KID_SUBSET_SIZE)} images, excluding pairs of an image and its own "
            "reconstruction; ± is the jackknife standard error"
        )
    if "ms_ssim" not in metrics:
        provenance["ms_ssim"] = f"not defined for images of {model.image_size} px (sides must be above {MS_SSIM_SIDE})"
    if task.manifest.kind == "videos":
        provenance["clips"] = (
            f"{model.frames} frames, {_format_stride(data.frame_stride)} of the video; "
            f"at most {data.clips_per_video} clips per video, centered in segments of equal length"
        )
        provenance["skipped"] = list(task.source.notes)
        if "rfvd" not in metrics:
            provenance["rfvd"] = f"not defined for clips of {model.frames} frames (I3D needs {MIN_FRAMES} or more)"
    return provenance


def _render_plots(accumulator: MetricAccumulator, is_video: bool) -> dict[str, bytes]:
    """Return the content of the plots by file name."""
    comparisons, lpips_scores = accumulator.comparisons, accumulator.lpips_scores
    if not is_video:
        return {"reconstructions.png": render_grid(comparisons, lpips_scores)}
    return {
        "reconstructions.png": render_strips(comparisons, lpips_scores),
        "reconstructions.webp": render_animation(comparisons, lpips_scores, _ANIMATION_FPS),
    }


_DEFAULT_BATCH_SIZES = {"images": 32, "videos": 2}
_UNITS = {"images": "images", "videos": "clips"}


def _format_stride(stride: int) -> str:
    ending = "th" if 10 < stride % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(stride % 10, "th")
    return f"every {stride}{ending} frame" if stride > 1 else "every frame"


# Metric name to column title, number of decimals, and better direction (max, min, or None for neither).
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
    "kid_standard_error": ("KID ±", 4, None),
    "rfvd": ("rFVD", 1, min),
    "flicker": ("flicker", 2, min),
    "code_usage": ("codes used", 4, None),
    "bit_entropy": ("bit entropy", 3, None),
    "images_per_second": ("images/s", 1, None),
    "frames_per_second": ("frames/s", 1, None),
}


def reconstruction_markdown(results: dict[str, Any]) -> str:
    """Return a Markdown table with the better value of each column in bold, followed by the provenance."""
    lines = metric_table(results["rows"], COLUMNS)
    provenance = results["provenance"]
    data = f"{provenance['data']} ({provenance['data_hash'][:12]})"
    count = f"{provenance['num_samples']} {_UNITS[provenance['kind']]}"
    preprocessing = f"{provenance['packing']}, {provenance['resize']}"
    lines += ["", f"{count} of {data}, {preprocessing}; {provenance['pixels']}."]
    lines += [f"KID: {provenance['kid']}."] if "kid" in provenance else []
    lines += [f"Clips: {provenance['clips']}."] if "clips" in provenance else []
    lines += [f"Skipped: {note}." for note in provenance.get("skipped", ())]
    if "warning" in provenance:
        lines.append(f"Note: {provenance['warning']}.")
    return "\n".join(lines)
