"""Commands that measure a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.options import AddressOption, WeightsOption, drop_none, parse_weights, progress_bar


def evaluate_reconstruction(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="Packed images or videos.")],
    out: Annotated[str, typer.Option(help="Folder or URL for the results.")],
    workers: Annotated[int, typer.Option(min=0, help="Measuring processes; 0 measures without Ray.")] = 1,
    weights: WeightsOption = "ema",
    batch_size: Annotated[int | None, typer.Option(min=1, help="At once; default 32 images or 2 clips.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many images or clips.")] = None,
    max_damaged: Annotated[int, typer.Option(min=0, help="Images or clips that may be unreadable.")] = 0,
    published: Annotated[bool, typer.Option("--published", help="Show published figures beside.")] = False,
    address: AddressOption = None,
) -> None:
    """PSNR, SSIM, LPIPS, code usage, of images rFID and KID, of clips rFVD and flicker, beside the trivial codec."""
    from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction as evaluate

    weights_kind = parse_weights(weights)
    with progress_bar("measuring") as on_progress:
        evaluate(
            model, data, out, workers, address, weights_kind, batch_size, limit, published, max_damaged, on_progress
        )
    from bsq_ray import storage

    print(storage.read_text(storage.join(out, "results.md")), end="")
    print(f"\nresults: {out.rstrip('/')}/results.json, results.md, reconstructions.png")


def evaluate_generation(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    data: Annotated[str, typer.Option(help="Packed real images.")],
    out: Annotated[str, typer.Option(help="Folder or URL for the results.")],
    workers: Annotated[int, typer.Option(min=0, help="Drawing and measuring processes; 0 works without Ray.")] = 1,
    count: Annotated[int | None, typer.Option(help="Images to draw; default: as many as there are real ones.")] = None,
    steps: Annotated[int | None, typer.Option(help="Forward passes of an image.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn images.")] = 0,
    reference_data: Annotated[str | None, typer.Option(help="Packed images that show how classes look.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Token table: a row of its per-position frequencies.")] = None,
    weights: WeightsOption = "ema",
    address: AddressOption = None,
) -> None:
    """FID, KID, precision, recall, and whether the classes can be told."""
    from bsq_ray import storage
    from bsq_ray.evaluation.generation.evaluate_generation import evaluate_generation as evaluate

    sampling_overrides = drop_none(steps=steps, guidance=guidance)
    with progress_bar("drawing") as on_progress:
        weights_kind = parse_weights(weights)
        evaluate(
            model,
            data,
            out,
            workers,
            address,
            count,
            sampling_overrides,
            seed,
            reference_data,
            baseline,
            weights_kind,
            on_progress,
        )
    print(storage.read_text(storage.join(out, "results.md")), end="")
    print(f"\nresults: {out.rstrip('/')}/results.json, results.md, samples.png")


def evaluate_compression(
    model: Annotated[str, typer.Option(help="Model folder of a prior, or of a tokenizer (raw bits).")],
    data: Annotated[str, typer.Option(help="Folder of images, or of clips: Kodak, MCL-JCV, UVG or your own.")],
    out: Annotated[str, typer.Option(help="Folder or URL for the results.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 works without Ray.")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="Only the first so many frames of each clip.")] = None,
    max_side: Annotated[int | None, typer.Option(min=8, help="Shrink what has a longer side to it before.")] = None,
    weights: WeightsOption = "ema",
    address: AddressOption = None,
) -> None:
    """Rate and distortion beside JPEG, JPEG 2000, WebP, AVIF, JPEG XL; of clips beside H.264, HEVC, AV1."""
    from bsq_ray import storage
    from bsq_ray.evaluation.compression.evaluate_compression import evaluate_compression as evaluate

    weights_kind = parse_weights(weights)
    with progress_bar("compressing") as on_progress:
        evaluate(model, data, out, workers, address, frames, max_side, weights_kind, on_progress)
    print(storage.read_text(storage.join(out, "results.md")), end="")
    print(f"\nresults: {out.rstrip('/')}/results.json, results.md, curves.png, pictures.png")
