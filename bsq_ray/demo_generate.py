"""The demo of generation: labelled photographs ─▶ tokenizer ─▶ token tables ─▶ masked LM ─▶ drawn images, measured.

Everything runs as the single commands would run it; an interrupted demo goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsq_ray import config, storage
from bsq_ray.quickstart import packed, say

_WORKERS = 2
_HELD_OUT_SHARE, _FEWEST = 10, 5
_VIEWS, _SCALE = 12, 1.25
_GUIDANCE = (0.0, 0.5, 1.0, 2.0, 4.0)
# Of the training minutes, the tokenizer's part.
_TOKENIZER_SHARE = 0.5


@dataclass(frozen=True)
class Demo:
    """Where everything is, and what to tell.

    Attributes:
        model, sheet: paths of the model folder and of the sheet of drawn images.
        results: figures by guidance, and what a token costs.
        summary: lines for a person.
    """

    model: Path
    sheet: Path
    results: dict[str, Any]
    summary: str


def run_demo(
    images: Path | None,
    out: Path,
    minutes: float,
    tokenizer_overrides: tuple[str, ...] = (),
    lm_overrides: tuple[str, ...] = (),
    drawn: int | None = None,
) -> Demo:
    """Trains a tokenizer and a masked language model on labelled photographs, draws images and measures them.

    Args:
        images: a folder with a subfolder of photographs for each class; None collects some from packages.
        out: folder for everything.
        minutes: of training, both models together.
        tokenizer_overrides, lm_overrides: changes of the presets `demo` and `masked-lm-demo`.
        drawn: images to draw for each measurement; by default as many as are held out.

    Raises:
        ValueError: too few photographs or classes.
    """
    if minutes <= 0:
        raise ValueError(f"--minutes {minutes} must be positive")
    folders = _collect(images, out)

    from bsq_ray.data.manifest import read_manifest
    from bsq_ray.data.tokenize import tokenize
    from bsq_ray.session import ray_session
    from bsq_ray.training.checkpoint import list_checkpoints
    from bsq_ray.training.launch import train

    def trained(run: config.AnyConfig, name: str, data: dict[str, str], share: float) -> str:
        where = str(out / name)
        resume = bool(list_checkpoints(where))
        train(run, data["train"], where, _WORKERS, resume, held_out_url=data["held_out"], minutes=minutes * share)
        return storage.join(where, "model")

    with ray_session():
        shards = {name: packed(folder, out / "data" / name) for name, folder in folders.items()}
        classes = read_manifest(shards["train"]).classes
        if classes != read_manifest(shards["held_out"]).classes:
            raise ValueError(f"{folders['train']} and {folders['held_out']} have different classes")
        tokenizer = trained(config.load_config("demo", tokenizer_overrides), "tokenizer", shards, _TOKENIZER_SHARE)
        tables = {}
        for name, views in (("train", _VIEWS), ("held_out", 1)):
            tables[name] = str(out / "tokens" / name)
            made = tokenize(tokenizer, shards[name], tables[name], _WORKERS, views=views, scale=_SCALE, flip=True)
            say(f"{made.table.rows} rows of tokens in {tables[name]}")
        lm = config.load_config("masked-lm-demo", (f"model.classes={len(classes)}", *lm_overrides))
        model = trained(lm, "masked-lm", tables, 1 - _TOKENIZER_SHARE)
        results = _measure(model, shards, tables, out, drawn)
    return Demo(Path(model), out / "samples.png", results, _summary(results, model, out))


def _collect(images: Path | None, out: Path) -> dict[str, Path]:
    """Folders of training and held-out photographs, each with a subfolder for each class."""
    if images is None:
        from bsq_ray.data.labelled import collect_labelled

        train, held_out = collect_labelled(out / "photographs", out / "packages")
        return {"train": train, "held_out": held_out}
    from bsq_ray.data.pack import IMAGE_SUFFIXES

    if not images.is_dir():
        raise ValueError(f"{images} is not a folder" if images.exists() else f"{images} does not exist")
    folders = {name: out / "photographs" / name for name in ("train", "held_out")}
    found = {
        folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        for folder in sorted(images.iterdir())
        if folder.is_dir()
    }
    few = [f"{name} ({len(paths)})" for name, paths in found.items() if len(paths) < _FEWEST]
    if len(found) < 2 or few:
        told = f"; too few are in {', '.join(few)}" if few else f"; it has {len(found)} of them"
        raise ValueError(f"{images} must have two or more class folders with {_FEWEST} photographs or more each{told}")
    for name, paths in found.items():
        by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in paths}
        for place, digest in enumerate(sorted(by_digest)):
            path = by_digest[digest]
            folder = folders["train" if place % _HELD_OUT_SHARE else "held_out"] / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{digest[:12]}{path.suffix.lower()}")
    return folders


def _measure(
    model: str, shards: dict[str, str], tables: dict[str, str], out: Path, drawn: int | None
) -> dict[str, Any]:
    from bsq_ray.data.tokens import TokenSource, read_table
    from bsq_ray.evaluation.generation import evaluate_generation
    from bsq_ray.evaluation.token_frequencies import frequency_bits

    run = config.expect(config.load_config(f"{model}/config.yaml"), config.MaskedLMConfig, model)
    sources = {name: TokenSource(read_table(url), run.model) for name, url in tables.items()}
    summary = json.loads(storage.read_bytes(str(Path(model).parent / "summary.json")))
    results: dict[str, Any] = {
        "bits_per_token": summary["figures"]["bits_per_token"],
        "bits_per_token_of_frequencies": frequency_bits(sources["train"], sources["held_out"], run.model.sub_bits),
        "guidance": {},
    }
    for guidance in _GUIDANCE:
        say(f"drawing and measuring at guidance {guidance:g}")
        found = evaluate_generation(
            model,
            shards["held_out"],
            str(out / "evaluation" / f"guidance-{guidance:g}"),
            _WORKERS,
            count=drawn,
            sampling={"guidance": guidance},
            known_url=shards["train"],
            baseline_url=tables["train"] if guidance == _GUIDANCE[0] else None,
        )
        results["guidance"][f"{guidance:g}"] = found["rows"]["model"]
        results["frequencies"] = found["rows"].get("per-position frequencies", results.get("frequencies"))
    best = min(results["guidance"], key=lambda g: results["guidance"][g]["kid"])
    results["best"] = best
    shutil.copy(out / "evaluation" / f"guidance-{best}" / "samples.png", out / "samples.png")
    storage.write_bytes(str(out / "results.json"), json.dumps(results, indent=1).encode())
    return results


def _summary(results: dict[str, Any], model: str, out: Path) -> str:
    lines = [
        "A masked token costs {bits_per_token:.2f} bits with the model, {bits_per_token_of_frequencies:.2f} by its "
        "place's frequencies (held-out photographs).".format(**results),
        "",
        "guidance      KID    classes told   precision   recall",
    ]
    rows = {**results["guidance"], "frequencies": results["frequencies"]}
    for name, row in rows.items():
        figures = f"{row['kid']:7.4f}   {row['class_accuracy']:9.3f}   {row['precision']:10.3f}   {row['recall']:6.3f}"
        lines.append(f"{name:11s} {figures}")
    return "\n".join([*lines, f"model: {model}", f"sheet: {out / 'samples.png'}"])
