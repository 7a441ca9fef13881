"""Commands that evaluate a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.extras import require_extra
from bsq_ray.cli.options import (
    AddressOption,
    ProgressBar,
    WeightsOption,
    announce_ray,
    drop_none,
    parse_floats,
    parse_ints,
    parse_weights,
)


def evaluate_reconstruction(
    model: Annotated[str, typer.Option(help="Model folder of a tokenizer.")],
    data: Annotated[str, typer.Option(help="Packed images or videos.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the results.")],
    workers: Annotated[int, typer.Option(min=0, help="Evaluation workers. 0 evaluates without Ray.")] = 1,
    weights: WeightsOption = "ema",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per batch. Default: 32 images or 2 clips.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of samples to evaluate. Default: all.")] = None,
    max_skipped_samples: Annotated[int, typer.Option(min=0, help="Maximum number of unreadable samples to skip.")] = 0,
    bits: Annotated[
        str | None, typer.Option(help="Also measure a tokenizer with nested bits at these bits per token: 6,9,12.")
    ] = None,
    cut_bits: Annotated[
        str | None, typer.Option(help="Baseline: also measure an ordinary tokenizer with its tokens cut to these bits.")
    ] = None,
    flips: Annotated[
        str | None, typer.Option(help="Also decode tokens whose bits flip with these probabilities: 0.02,0.05,0.1.")
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="Add published results to the output.")] = False,
    address: AddressOption = None,
) -> None:
    """Evaluate reconstructions against a baseline at the same bit rate.

    Metrics: PSNR, SSIM, LPIPS, code usage; rFID and KID for images; rFVD and flicker for clips.
    """
    require_extra("evaluate reconstruction", "eval", *(("ray",) if workers else ()))
    weights_kind = parse_weights(weights)
    flip_rates = parse_floats(flips or "", "--flips")
    num_bits, num_cut_bits = parse_ints(bits or "", "--bits"), parse_ints(cut_bits or "", "--cut-bits")

    from bsq_ray.evaluation.reconstruction.evaluate_reconstruction import evaluate_reconstruction as evaluate

    announce_ray(workers, address)
    with ProgressBar("evaluating") as on_progress:
        evaluate(
            model,
            data,
            out,
            workers=workers,
            address=address,
            weights=weights_kind,
            batch_size=batch_size,
            limit=limit,
            show_published=published,
            max_skipped_samples=max_skipped_samples,
            bits=num_bits,
            cut_bits=num_cut_bits,
            flip_rates=flip_rates,
            on_progress=on_progress,
        )
    _print_results(out, "reconstructions.png")


def evaluate_generation(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    data: Annotated[str, typer.Option(help="Packed real images.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the results.")],
    workers: Annotated[int, typer.Option(min=0, help="Evaluation workers. 0 evaluates without Ray.")] = 1,
    num_images: Annotated[int | None, typer.Option(help="Images to generate. Default: as many as real images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Forward passes per image.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    reference_data: Annotated[
        str | None, typer.Option(help="Packed labeled images, the reference set of the class accuracy (5-NN).")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Token table; adds a baseline that samples from its per-position frequencies.")
    ] = None,
    weights: WeightsOption = "ema",
    address: AddressOption = None,
) -> None:
    """Evaluate generated images: FID, KID, precision, recall, class accuracy (5-NN)."""
    require_extra("evaluate generation", "eval", *(("ray",) if workers else ()))
    weights_kind = parse_weights(weights)

    from bsq_ray.evaluation.generation.evaluate_generation import evaluate_generation as evaluate

    announce_ray(workers, address)
    with ProgressBar("generating") as on_progress:
        evaluate(
            model,
            data,
            out,
            workers=workers,
            address=address,
            count=num_images,
            sampling=drop_none(steps=steps, guidance_scale=guidance_scale),
            seed=seed,
            reference_url=reference_data,
            baseline_url=baseline,
            weights=weights_kind,
            on_progress=on_progress,
        )
    _print_results(out, "samples.png")


def evaluate_compression(
    model: Annotated[str, typer.Option(help="Model folder of a prior, or of a tokenizer (no entropy coding).")],
    data: Annotated[
        str, typer.Option(help="Folder of images or clips: Kodak, CLIC 2020, DIV2K, MCL-JCV, UVG or your own.")
    ],
    out: Annotated[str, typer.Option(help="Folder or URL of the results.")],
    workers: Annotated[int, typer.Option(min=0, help="Evaluation workers. 0 evaluates without Ray.")] = 1,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Number of frames to use from the start of each clip. Default: all.")
    ] = None,
    max_side: Annotated[int | None, typer.Option(min=8, help="Longer side to downscale to, in pixels.")] = None,
    bits: Annotated[
        str | None,
        typer.Option(help="Bits per token of a tokenizer with nested bits: 6,9,12. Default: those of its training."),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Metrics. PSNR is always measured; DISTS takes most of the time.")
    ] = "psnr,ms_ssim,lpips,dists",
    weights: WeightsOption = "ema",
    address: AddressOption = None,
) -> None:
    """Compare rate and distortion of a model with those of standard codecs.

    Images: JPEG, JPEG 2000, WebP, AVIF, JPEG XL. Clips: H.264, HEVC, AV1.
    """
    require_extra("evaluate compression", "eval", "bjontegaard", *(("ray",) if workers else ()))
    weights_kind = parse_weights(weights)
    num_bits = parse_ints(bits or "", "--bits")

    from bsq_ray.evaluation.compression.evaluate_compression import evaluate_compression as evaluate

    announce_ray(workers, address)
    with ProgressBar("compressing") as on_progress:
        evaluate(
            model,
            data,
            out,
            workers=workers,
            address=address,
            max_frames=frames,
            max_side=max_side,
            bits=num_bits,
            metrics=[name.strip() for name in metrics.split(",") if name.strip()],
            weights=weights_kind,
            on_progress=on_progress,
        )
    _print_results(out, "curves.png, comparison.png")


def _print_results(out: str, plots: str) -> None:
    from bsq_ray import storage

    print(storage.read_text(storage.join(out, "results.md")), end="")
    print(f"\nresults: {out.rstrip('/')}/results.json, results.md, {plots}")
