"""The quickstart: train and evaluate a small tokenizer on images or clips, and write a report.

images or clips ─▶ shards ─▶ training on Ray, two workers ─▶ evaluation on held-out samples ─▶ report.html
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsq_ray.config import load_config
from bsq_ray.demos.prepare_data import (
    PHOTOS,
    UNLIMITED_STEPS,
    SampleSet,
    log,
    pack_if_needed,
    split_by_content,
)

_WORKERS = 2
_EVALUATION_WORKERS = 2
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class QuickstartResult:
    """Result of a quickstart.

    Attributes:
        model, report: paths of the model folder and of the report.
        results: content of the evaluation's results.json.
        summary: text that the command prints.
    """

    model: Path
    report: Path
    results: dict[str, Any]
    summary: str


def run_quickstart(
    source: Path | None, out: Path, minutes: float, overrides: tuple[str, ...] = (), sample_set: SampleSet = PHOTOS
) -> QuickstartResult:
    """Pack images or clips, train a demo preset on Ray, evaluate it on held-out samples and write a report.

    An interrupted quickstart resumes if it is run again with the same folder.

    Args:
        source: folder of images or clips; None takes photos or clips of the installed sample packages.
        out: folder of data, run, evaluation and report.
        minutes: training time.
        overrides: `key.path=value` changes of the preset.
        sample_set: kind of the samples.

    Raises:
        ValueError: too few images or clips, or `out` was made from other samples.
    """
    if minutes <= 0:
        raise ValueError(f"--minutes {minutes} must be positive")
    config = load_config(sample_set.preset, (UNLIMITED_STEPS, *overrides))
    _claim_folder(out, source, sample_set)
    train_folder, held_out_folder = _collect_files(source, out, sample_set)

    from bsq_ray.runtime.ray_session import ray_session

    with ray_session():
        from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
        from bsq_ray.evaluation.report import write_report
        from bsq_ray.training.checkpoints.writer import list_checkpoints
        from bsq_ray.training.launch import Interrupted, train

        data = {
            "train": pack_if_needed(train_folder, out / "data" / "train", sample_set),
            "held_out": pack_if_needed(held_out_folder, out / "data" / "held_out", sample_set),
        }
        run_url = str(out / "run")
        try:
            trained = train(
                config,
                data["train"],
                run_url,
                _WORKERS,
                resume=bool(list_checkpoints(run_url)),
                held_out_url=data["held_out"],
                minutes=minutes,
            )
        except Interrupted as stop:
            raise Interrupted(f"{stop}. Run the same quickstart again to resume") from None
        log(f"evaluating on held-out {sample_set.name}")
        results = evaluate_reconstruction(
            f"{run_url}/model", data["held_out"], str(out / "evaluation"), workers=_EVALUATION_WORKERS
        )
    report = out / "report.html"
    write_report(run_url, str(out / "evaluation"), str(report))
    model = out / "run" / "model"
    return QuickstartResult(model, report, results, _format_summary(results, trained.step, sample_set, model, report))


def _claim_folder(out: Path, folder: Path | None, sample_set: SampleSet) -> None:
    """Record the source of `out`, and check that a second call has the same source."""
    source_file = out / "quickstart.json"
    source = str(folder.resolve()) if folder else f"sample {sample_set.name}"
    try:
        if source_file.exists():
            previous_source = _previous_source(source_file)
            if previous_source != source:
                raise ValueError(f"{out} was made from {previous_source}; choose another --out for {source}")
            return
        out.mkdir(parents=True, exist_ok=True)
        source_file.write_text(json.dumps({"images": source}))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from error


def _previous_source(source_file: Path) -> str:
    """Read the source of an output folder."""
    try:
        return str(json.loads(source_file.read_text())["images"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{source_file} is damaged: the source of {source_file.parent} is unknown; choose another --out"
        ) from None


def _collect_files(source: Path | None, out: Path, sample_set: SampleSet) -> tuple[Path, Path]:
    """Return the folders of training and of held-out files; no file is in both."""
    from bsq_ray.data.file_list import find_files
    from bsq_ray.media.images import IMAGE_SUFFIXES
    from bsq_ray.media.video_reader import VIDEO_SUFFIXES
    from bsq_ray.samples.photos import collect_photos, collect_videos

    if source is None:
        return collect_photos(out / sample_set.name) if sample_set is PHOTOS else collect_videos(out / sample_set.name)
    suffixes = IMAGE_SUFFIXES if sample_set is PHOTOS else VIDEO_SUFFIXES
    found, ignored = find_files(str(source), sample_set.kind, suffixes)
    files = [Path(file.path) for file in found]
    for line in ignored.describe():
        log(f"ignored {line}")
    if len(files) < sample_set.min_files:
        raise ValueError(
            f"{source} contains {len(files)} {sample_set.kind}; the quickstart needs at least {sample_set.min_files}"
        )
    folders = out / sample_set.name / "train", out / sample_set.name / "held_out"
    split_by_content(files, *folders, _HELD_OUT_EVERY)
    return folders


def _format_summary(results: dict[str, Any], num_steps: int, sample_set: SampleSet, model: Path, report: Path) -> str:
    model_row, baseline_row = results["rows"]["model"], results["rows"]["mean color"]
    num_samples, bits_per_pixel = results["provenance"]["num_samples"], model_row["bits_per_pixel"]
    lines = [
        f"After {num_steps} steps, on {num_samples} held-out {sample_set.name} at {bits_per_pixel:g} bits per pixel:",
        "                       PSNR     LPIPS" + ("     rFVD" if "rfvd" in model_row else ""),
    ]
    for name, row in (("this tokenizer", model_row), ("mean colors  ", baseline_row)):
        rfvd_text = f"  {row['rfvd']:7.1f}" if "rfvd" in row else ""
        lines.append(f"  {name}     {row['psnr']:6.2f} dB  {row['lpips']:.3f}{rfvd_text}")
    lines[-1] += "   (baseline, same bits)"
    return "\n".join([*lines, f"model:  {model}", f"report: {report}"])
