"""The generation demo.

labeled photos ─▶ tokenizer ─▶ token tables ─▶ masked language model ─▶ generated images ─▶ evaluation
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsq_ray import config, storage
from bsq_ray.demos.prepare_data import UNLIMITED_STEPS, log
from bsq_ray.demos.token_pipeline import WHOLE_PHOTOS, WORKERS, TokenPipeline

_GUIDANCE_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)
# Precision and recall use the third nearest neighbor.
_MIN_HELD_OUT = 4


@dataclass(frozen=True)
class GenerateDemoResult:
    """Result of the generation demo.

    Attributes:
        model, sheet: paths of the model folder and of the sheet of generated images.
        results: metrics by guidance scale, and bits per token.
        summary: text that the command prints.
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
    """Train a tokenizer and a masked language model on labeled photos, generate images and evaluate them.

    Args:
        images: folder with a subfolder of photos for each class; None collects photos from packages.
        out: output folder.
        minutes: training time of both models together.
        tokenizer_overrides, lm_overrides: changes of the presets `demo` and `masked-lm-demo`.
        num_images: images generated for each evaluation; None: the number of held-out photos.

    Raises:
        ValueError: too few photos or classes.
    """
    from bsq_ray.runtime.ray_session import ray_session

    pipeline = TokenPipeline(images, out, minutes, WHOLE_PHOTOS)
    if pipeline.num_held_out < _MIN_HELD_OUT:
        raise ValueError(
            f"{images} has too few photos: one in ten of each class is held out, {pipeline.num_held_out} in total; add "
            f"photos until at least {_MIN_HELD_OUT} are held out"
        )
    with ray_session():
        pipeline.prepare(tokenizer_overrides)
        lm_config = config.load_config(
            "masked-lm-demo", (UNLIMITED_STEPS, f"model.num_classes={len(pipeline.classes)}", *lm_overrides)
        )
        model = pipeline.train(lm_config, "masked-lm", pipeline.token_tables)
        results = _evaluate(model, pipeline.shards, pipeline.token_tables, out, num_images)
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
        "bits_per_token": summary["metrics"]["held_out/bits_per_token"],
        "bits_per_token_of_frequencies": histogram_cross_entropy(
            sources["train"], sources["held_out"], run_config.model.sub_bits
        ),
        "guidance": {},
    }
    for guidance_scale in _GUIDANCE_SCALES:
        log(f"generating and evaluating with guidance scale {guidance_scale:g}")
        evaluation = evaluate_generation(
            model,
            shards["held_out"],
            str(out / "evaluation" / f"guidance-{guidance_scale:g}"),
            workers=WORKERS,
            count=num_images,
            sampling={"guidance_scale": guidance_scale},
            reference_url=shards["train"],
            baseline_url=tables["train"] if guidance_scale == _GUIDANCE_SCALES[0] else None,
        )
        results["guidance"][f"{guidance_scale:g}"] = evaluation["rows"]["model"]
        results["frequencies"] = evaluation["rows"].get("per-position frequencies", results.get("frequencies"))
    best = min(results["guidance"], key=lambda g: results["guidance"][g]["kid"])
    results["best"] = best
    shutil.copy(out / "evaluation" / f"guidance-{best}" / "samples.png", out / "samples.png")
    storage.write_text(str(out / "results.json"), json.dumps(results, indent=1))
    return results


def _format_summary(results: dict[str, Any], model: str, out: Path) -> str:
    lines = [
        "A masked token costs {bits_per_token:.2f} bits with the model, {bits_per_token_of_frequencies:.2f} with "
        "per-position frequencies (held-out photos).".format(**results),
        "",
        "guidance      KID    class accuracy   precision   recall",
    ]
    rows = {**results["guidance"], "frequencies": results["frequencies"]}
    for name, row in rows.items():
        columns = f"{row['kid']:7.4f}   {row['class_accuracy']:9.3f}   {row['precision']:10.3f}   {row['recall']:6.3f}"
        lines.append(f"{name:11s} {columns}")
    return "\n".join([*lines, f"model: {model}", f"sheet: {out / 'samples.png'}"])
