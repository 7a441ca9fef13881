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
BY_THE_CLOCK = "training.steps=1000000"
_WORKERS = 2
_HELD_OUT_SHARE = 5


@dataclass(frozen=True)
class Material:
    """What a quickstart is made from.

    Attributes:
        name: what a person calls it.
        files: the word of the data commands.
        preset: what is trained.
        max_side: longest side that is packed, pixels.
        fewest: fewer files teach nothing and measure nothing.
    """

    name: str
    files: str
    preset: str
    max_side: int
    fewest: int


PHOTOGRAPHS = Material("photographs", "images", "demo", 256, 10)
CLIPS = Material("clips", "videos", "demo-video", 176, 2)


@dataclass(frozen=True)
class Quickstart:
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
    source: Path | None, out: Path, minutes: float, overrides: tuple[str, ...] = (), material: Material = PHOTOGRAPHS
) -> Quickstart:
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
    config = load_config(material.preset, (BY_THE_CLOCK, *overrides))
    _claim(out, source, material)
    train_folder, held_out_folder = _collect(source, out, material)

    from bsq_ray.runtime.ray_session import ray_session

    with ray_session():
        from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction
        from bsq_ray.evaluation.report import write_report
        from bsq_ray.training.checkpoints.writer import list_checkpoints
        from bsq_ray.training.launch import Interrupted, train

        data = {name: packed(folder, out / "data" / name, material) for name, folder in
                {"train": train_folder, "held_out": held_out_folder}.items()}  # fmt: skip
        run = str(out / "run")
        try:
            train(
                config,
                data["train"],
                run,
                _WORKERS,
                resume=bool(list_checkpoints(run)),
                held_out_url=data["held_out"],
                minutes=minutes,
            )
        except Interrupted as stop:
            raise Interrupted(f"{stop}. Run the same quickstart again to go on") from None
        say(f"measuring on {material.name} that training did not see")
        results = evaluate_reconstruction(f"{run}/model", data["held_out"], str(out / "evaluation"), workers=_WORKERS)
    report = out / "report.html"
    write_report(run, str(out / "evaluation"), str(report))
    model = out / "run" / "model"
    return Quickstart(model, report, results, _summary(results, material, model, report))


def _claim(out: Path, folder: Path | None, material: Material) -> None:
    """Notes what `out` is made from, so that nothing else is mixed in."""
    note = out / "quickstart.json"
    source = str(folder.resolve()) if folder else f"sample {material.name}"
    try:
        if note.exists():
            before = _noted(note)
            if before != source:
                raise ValueError(f"{out} was made from {before}; choose another --out for {source}")
            return
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"images": source}))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from error


def _noted(note: Path) -> str:
    """What a folder was made from."""
    try:
        return str(json.loads(note.read_text())["images"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{note} is damaged and does not say what {note.parent} is; choose another --out") from None


def _collect(source: Path | None, out: Path, material: Material) -> tuple[Path, Path]:
    """Folders of training and of held-out files: no file is on both sides."""
    from bsq_ray.data.transforms import IMAGE_SUFFIXES
    from bsq_ray.media.video_reader import VIDEO_SUFFIXES
    from bsq_ray.samples.photos import collect_photos, collect_videos

    if source is None:
        return (collect_photos if material is PHOTOGRAPHS else collect_videos)(out / material.name)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder" if source.exists() else f"{source} does not exist")
    suffixes = IMAGE_SUFFIXES if material is PHOTOGRAPHS else VIDEO_SUFFIXES
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes)
    if len(found) < material.fewest:
        raise ValueError(
            f"{source} holds {len(found)} {material.files}; the quickstart needs at least {material.fewest}"
        )
    folders = out / material.name / "train", out / material.name / "held_out"
    split_by_content(found, *folders, _HELD_OUT_SHARE)
    return folders


def split_by_content(found: Iterable[Path], train: Path, held_out: Path, share: int) -> None:
    """Copies files into two folders, in the order of their SHA-256 one in `share` to the held-out ones.

    By content, so that two copies of a file count once and are never on both sides.
    """
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in found}
    for folder in (train, held_out):
        folder.mkdir(parents=True, exist_ok=True)
    for place, (digest, path) in enumerate(sorted(by_digest.items())):
        folder = train if place % share else held_out
        shutil.copy(path, folder / f"{digest[:12]}{path.suffix.lower()}")


def packed(folder: Path, destination: Path, material: Material = PHOTOGRAPHS) -> str:
    """Packs a folder, unless that is done already; the packed folder."""
    from bsq_ray.data.manifest import MANIFEST_FILE
    from bsq_ray.data.pack import pack_images, pack_videos

    if not (destination / MANIFEST_FILE).exists():
        pack = pack_images if material is PHOTOGRAPHS else pack_videos
        report = pack(str(folder), str(destination), max_side=material.max_side)
        say(f"packed {report.manifest.num_samples} {material.name} into {destination}")
        for line in report.damaged + report.too_short:
            say(f"left out {line}")
    return str(destination)


def _summary(results: dict[str, Any], material: Material, model: Path, report: Path) -> str:
    ours, trivial = results["rows"]["model"], results["rows"]["mean colour"]
    lines = [
        f"On {results['contract']['images']} held-out {material.name} at {ours['bits_per_pixel']:g} bits per pixel:",
        "                       PSNR     LPIPS" + ("     rFVD" if "rfvd" in ours else ""),
    ]
    for name, row in (("this tokenizer", ours), ("mean colours  ", trivial)):
        more = f"  {row['rfvd']:7.1f}" if "rfvd" in row else ""
        lines.append(f"  {name}     {row['psnr']:6.2f} dB  {row['lpips']:.3f}{more}")
    lines[-1] += "   (the trivial codec, same bits)"
    return "\n".join([*lines, f"model:  {model}", f"report: {report}"])


def say(line: str) -> None:
    """A line for the person who waits; results go to stdout, this does not."""
    print(line, file=sys.stderr, flush=True)
