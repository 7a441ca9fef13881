"""The quickstart: from photographs or clips to a trained, measured tokenizer and a report, in one command.

photographs or clips ─▶ shards ─▶ training on Ray, two workers ─▶ measuring held-out ones ─▶ report.html
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsq_ray.config import load_config

# The minutes end a run, not the steps of its preset.
UNLIMITED_STEPS = "training.steps=1000000"
_WORKERS = 2
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class SampleSet:
    """What a quickstart is made from.

    Attributes:
        name: what a person calls it.
        files: the word of the data commands.
        preset: what is trained.
        max_side: longest side that is packed, pixels.
        fewest: fewer files teach nothing and measure nothing.
    """

    name: str
    kind: str
    preset: str
    max_side: int
    min_files: int


PHOTOS = SampleSet("photographs", "images", "demo", 256, 10)
CLIPS = SampleSet("clips", "videos", "demo-video", 176, 2)


@dataclass(frozen=True)
class QuickstartResult:
    """Where everything is, and what to tell.

    Attributes:
        model, report: paths of the model folder and of the report.
        results: content of the evaluation's results.json.
        summary: a few lines for a person.
    """

    model: Path
    report: Path
    results: dict[str, Any]
    summary: str


def run_quickstart(
    source: Path | None, out: Path, minutes: float, overrides: tuple[str, ...] = (), sample_set: SampleSet = PHOTOS
) -> QuickstartResult:
    """Packs photographs or clips, trains a demo preset on Ray, measures it on held-out ones and writes a report.

    An interrupted quickstart goes on where it was when it is run again with the same folder.

    Args:
        source: a folder of photographs or clips; None takes those of the installed sample packages.
        out: folder for data, run, measurements and report.
        minutes: of training.
        overrides: `key=value` changes of the preset.
        material: what lies in the folder.

    Raises:
        ValueError: too few photographs or clips, or `out` was made from others.
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

        data = {name: pack_if_needed(folder, out / "data" / name, sample_set) for name, folder in
                {"train": train_folder, "held_out": held_out_folder}.items()}  # fmt: skip
        run_url = str(out / "run")
        try:
            train(
                config,
                data["train"],
                run_url,
                _WORKERS,
                resume=bool(list_checkpoints(run_url)),
                held_out_url=data["held_out"],
                minutes=minutes,
            )
        except Interrupted as stop:
            raise Interrupted(f"{stop}. Run the same quickstart again to go on") from None
        log(f"measuring on {sample_set.name} that training did not see")
        results = evaluate_reconstruction(
            f"{run_url}/model", data["held_out"], str(out / "evaluation"), workers=_WORKERS
        )
    report = out / "report.html"
    write_report(run_url, str(out / "evaluation"), str(report))
    model = out / "run" / "model"
    return QuickstartResult(model, report, results, _format_summary(results, sample_set, model, report))


def _claim_folder(out: Path, folder: Path | None, sample_set: SampleSet) -> None:
    """Notes what `out` is made from, so that nothing else is mixed in."""
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
    """What a folder was made from."""
    try:
        return str(json.loads(source_file.read_text())["images"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{source_file} is damaged and does not say what {source_file.parent} is; choose another --out"
        ) from None


def _collect_files(source: Path | None, out: Path, sample_set: SampleSet) -> tuple[Path, Path]:
    """Folders of training and of held-out files: no file is on both sides."""
    from bsq_ray.data.transforms import IMAGE_SUFFIXES
    from bsq_ray.media.video_reader import VIDEO_SUFFIXES
    from bsq_ray.samples.photos import collect_photos, collect_videos

    if source is None:
        return (collect_photos if sample_set is PHOTOS else collect_videos)(out / sample_set.name)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder" if source.exists() else f"{source} does not exist")
    suffixes = IMAGE_SUFFIXES if sample_set is PHOTOS else VIDEO_SUFFIXES
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes)
    if len(files) < sample_set.min_files:
        raise ValueError(
            f"{source} holds {len(files)} {sample_set.kind}; the quickstart needs at least {sample_set.min_files}"
        )
    folders = out / sample_set.name / "train", out / sample_set.name / "held_out"
    split_by_content(files, *folders, _HELD_OUT_EVERY)
    return folders


def split_by_content(files: Iterable[Path], train: Path, held_out: Path, held_out_every: int) -> None:
    """Copies files into two folders, in the order of their SHA-256 one in `share` to the held-out ones.

    By content, so that two copies of a file count once and are never on both sides.
    """
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}
    for folder in (train, held_out):
        folder.mkdir(parents=True, exist_ok=True)
    for index, (digest, path) in enumerate(sorted(by_digest.items())):
        folder = train if index % held_out_every else held_out
        shutil.copy(path, folder / f"{digest[:12]}{path.suffix.lower()}")


def pack_if_needed(folder: Path, dest: Path, sample_set: SampleSet = PHOTOS) -> str:
    """Packs a folder, unless that is done already; the packed folder."""
    from bsq_ray.data.manifest import MANIFEST_FILE
    from bsq_ray.data.pack import pack_images, pack_videos

    if not (dest / MANIFEST_FILE).exists():
        pack = pack_images if sample_set is PHOTOS else pack_videos
        report = pack(str(folder), str(dest), max_side=sample_set.max_side)
        log(f"packed {report.manifest.num_samples} {sample_set.name} into {dest}")
        for line in report.damaged + report.too_short:
            log(f"left out {line}")
    return str(dest)


def _format_summary(results: dict[str, Any], sample_set: SampleSet, model: Path, report: Path) -> str:
    model_row, baseline_row = results["rows"]["model"], results["rows"]["mean colour"]
    lines = [
        f"On {results['contract']['images']} held-out {sample_set.name} at {model_row['bits_per_pixel']:g} bits per pixel:",
        "                       PSNR     LPIPS" + ("     rFVD" if "rfvd" in model_row else ""),
    ]
    for name, row in (("this tokenizer", model_row), ("mean colours  ", baseline_row)):
        rfvd_text = f"  {row['rfvd']:7.1f}" if "rfvd" in row else ""
        lines.append(f"  {name}     {row['psnr']:6.2f} dB  {row['lpips']:.3f}{rfvd_text}")
    lines[-1] += "   (the trivial codec, same bits)"
    return "\n".join([*lines, f"model:  {model}", f"report: {report}"])


def log(line: str) -> None:
    """A line for the person who waits; results go to stdout, this does not."""
    print(line, file=sys.stderr, flush=True)
