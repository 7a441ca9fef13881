"""The demo of generation: labelled photographs ─▶ tokenizer ─▶ token tables ─▶ masked LM ─▶ drawn images, measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsq_ray import config, storage
from bsq_ray.demos.demo_tokens import WORKERS, TokenDemo
from bsq_ray.demos.quickstart import UNLIMITED_STEPS, log

_GUIDANCE_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)
# Precision and recall look at the third neighbour.
_MIN_HELD_OUT = 4


@dataclass(frozen=True)
class GenerateDemoResult:
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
    num_images: int | None = None,
) -> GenerateDemoResult:
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
    from bsq_ray.runtime.ray_session import ray_session

    demo = TokenDemo(images, out, minutes)
    if demo.num_held_out < _MIN_HELD_OUT:
        raise ValueError(
            f"{images} has too few photographs: one in ten of each class is held out, which are {demo.num_held_out}, and "
            f"drawn images are compared with at least {_MIN_HELD_OUT}"
        )
    with ray_session():
        demo.prepare(tokenizer_overrides)
        lm_config = config.load_config(
            "masked-lm-demo", (UNLIMITED_STEPS, f"model.num_classes={len(demo.classes)}", *lm_overrides)
        )
        model = demo.train(lm_config, "masked-lm", demo.tables)
        results = _evaluate(model, demo.shards, demo.tables, out, num_images)
    return GenerateDemoResult(Path(model), out / "samples.png", results, _format_summary(results, model, out))


def _evaluate(
    model: str, shards: dict[str, str], tables: dict[str, str], out: Path, num_images: int | None
) -> dict[str, Any]:
    from bsq_ray.data.token_table import TokenSource, read_table
    from bsq_ray.evaluation.generation.evaluate_generation import evaluate_generation
    from bsq_ray.evaluation.generation.frequency_baseline import histogram_cross_entropy

    run_config = config.require_stage(config.load_config(f"{model}/config.yaml"), config.MaskedLMConfig, model)
    sources = {name: TokenSource(read_table(url), run_config.model) for name, url in tables.items()}
    summary = json.loads(storage.read_bytes(str(Path(model).parent / "summary.json")))
    results: dict[str, Any] = {
        "bits_per_token": summary["figures"]["bits_per_token"],
        "bits_per_token_of_frequencies": histogram_cross_entropy(
            sources["train"], sources["held_out"], run_config.model.sub_bits
        ),
        "guidance": {},
    }
    for guidance_scale in _GUIDANCE_SCALES:
        log(f"drawing and measuring at guidance {guidance_scale:g}")
        evaluation = evaluate_generation(
            model,
            shards["held_out"],
            str(out / "evaluation" / f"guidance-{guidance_scale:g}"),
            WORKERS,
            count=num_images,
            sampling={"guidance": guidance_scale},
            reference_url=shards["train"],
            baseline_url=tables["train"] if guidance_scale == _GUIDANCE_SCALES[0] else None,
        )
        results["guidance"][f"{guidance_scale:g}"] = evaluation["rows"]["model"]
        results["frequencies"] = evaluation["rows"].get("per-position frequencies", results.get("frequencies"))
    best = min(results["guidance"], key=lambda g: results["guidance"][g]["kid"])
    results["best"] = best
    shutil.copy(out / "evaluation" / f"guidance-{best}" / "samples.png", out / "samples.png")
    storage.write_bytes(str(out / "results.json"), json.dumps(results, indent=1).encode())
    return results


def _format_summary(results: dict[str, Any], model: str, out: Path) -> str:
    lines = [
        "A masked token costs {bits_per_token:.2f} bits with the model, {bits_per_token_of_frequencies:.2f} by its "
        "place's frequencies (held-out photographs).".format(**results),
        "",
        "guidance      KID    classes told   precision   recall",
    ]
    rows = {**results["guidance"], "frequencies": results["frequencies"]}
    for name, row in rows.items():
        columns = f"{row['kid']:7.4f}   {row['class_accuracy']:9.3f}   {row['precision']:10.3f}   {row['recall']:6.3f}"
        lines.append(f"{name:11s} {columns}")
    return "\n".join([*lines, f"model: {model}", f"sheet: {out / 'samples.png'}"])
