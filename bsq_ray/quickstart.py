"""The quickstart: from photographs to a trained, measured tokenizer and a report, in one command.

photographs ─▶ shards ─▶ training on Ray, two workers ─▶ measuring held-out photographs ─▶ report.html
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsq_ray.config import load_config

_WORKERS = 2
_MAX_SIDE = 256
# Fewer photographs teach nothing and measure nothing.
_FEWEST = 10
_HELD_OUT_SHARE = 5


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


def run_quickstart(images: Path | None, out: Path, minutes: float, overrides: tuple[str, ...] = ()) -> Quickstart:
    """Packs photographs, trains the `demo` preset on Ray, measures it on held-out photographs and writes a report.

    An interrupted quickstart goes on where it was when it is run again with the same folder.

    Args:
        images: a folder of photographs; None takes those of the installed sample packages.
        out: folder for data, run, measurements and report.
        minutes: of training.
        overrides: `key=value` changes of the preset.

    Raises:
        ValueError: too few photographs, or `out` was made from others.
    """
    if minutes <= 0:
        raise ValueError(f"--minutes {minutes} must be positive")
    config = load_config("demo", overrides)
    _claim(out, images)
    train_folder, held_out_folder = _photographs(images, out)

    from bsq_ray.session import gpus_within_reach, ray_session

    with ray_session():
        from bsq_ray.evaluation.reconstruction import evaluate_reconstruction
        from bsq_ray.evaluation.report import write_report
        from bsq_ray.training.checkpoint import list_checkpoints
        from bsq_ray.training.launch import Interrupted, train

        data = {name: packed(folder, out / "data" / name) for name, folder in
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
                device="gpu" if gpus_within_reach() >= _WORKERS else "cpu",
            )
        except Interrupted as stop:
            raise Interrupted(
                f"{str(stop).split(';')[0]}; checkpoint and model are in {run}. Run the same quickstart again to go on"
            ) from None
        say("measuring on photographs that training did not see")
        results = evaluate_reconstruction(f"{run}/model", data["held_out"], str(out / "evaluation"), workers=_WORKERS)
    report = out / "report.html"
    write_report(run, str(out / "evaluation"), str(report))
    model = out / "run" / "model"
    return Quickstart(model, report, results, _summary(results, model, report))


def _claim(out: Path, images: Path | None) -> None:
    """Notes what `out` is made from, so that another folder of photographs is not mixed in."""
    note = out / "quickstart.json"
    source = str(images.resolve()) if images else "sample photographs"
    try:
        if note.exists():
            before = json.loads(note.read_text())["images"]
            if before != source:
                raise ValueError(f"{out} was made from {before}; choose another --out for {source}")
            return
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"images": source}))
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}") from error


def _photographs(images: Path | None, out: Path) -> tuple[Path, Path]:
    """Folders of training and of held-out photographs, split by photograph."""
    if images is None:
        from bsq_ray.data.samples import collect_samples

        return collect_samples(out / "photographs")
    from bsq_ray.data.pack import IMAGE_SUFFIXES

    if not images.is_dir():
        raise ValueError(f"{images} is not a folder" if images.exists() else f"{images} does not exist")
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < _FEWEST:
        raise ValueError(f"{images} holds {len(found)} images; the quickstart needs at least {_FEWEST}")
    folders = out / "photographs" / "train", out / "photographs" / "held_out"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    # By content, so that two copies of a photograph are on the same side.
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in found}
    for place, digest in enumerate(sorted(by_digest)):
        path = by_digest[digest]
        shutil.copy(path, folders[place % _HELD_OUT_SHARE == 0] / f"{digest[:12]}{path.suffix.lower()}")
    return folders


def packed(folder: Path, destination: Path) -> str:
    """Packs a folder of photographs, unless that is done already; the packed folder."""
    from bsq_ray.data.manifest import MANIFEST
    from bsq_ray.data.pack import pack_images

    if not (destination / MANIFEST).exists():
        report = pack_images(str(folder), str(destination), max_side=_MAX_SIDE)
        say(f"packed {report.manifest.samples} photographs into {destination}")
        for line in report.damaged:
            say(f"left out {line}")
    return str(destination)


def _summary(results: dict[str, Any], model: Path, report: Path) -> str:
    ours, trivial = results["rows"]["model"], results["rows"]["mean colour"]
    return (
        f"On {results['contract']['images']} held-out photographs at {ours['bits_per_pixel']:g} bits per pixel:\n"
        f"                       PSNR     LPIPS\n"
        f"  this tokenizer     {ours['psnr']:6.2f} dB  {ours['lpips']:.3f}\n"
        f"  mean colours       {trivial['psnr']:6.2f} dB  {trivial['lpips']:.3f}   (the trivial codec, same bits)\n"
        f"model:  {model}\n"
        f"report: {report}"
    )


def say(line: str) -> None:
    """A line for the person who waits; results go to stdout, this does not."""
    print(line, file=sys.stderr, flush=True)
