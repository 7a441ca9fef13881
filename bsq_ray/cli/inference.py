"""Commands that run a trained model on images, videos and .bsq files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bsq_ray.cli.options import ProgressBar, WeightsOption, drop_none, parse_ints, parse_weights


def generate(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    out: Annotated[str, typer.Option(help="Folder for the images.")],
    classes: Annotated[str, typer.Option(help="Comma-separated class indices, such as 1,2. Default: all.")] = "",
    num_images: Annotated[
        int, typer.Option(min=1, help="Images per class; interpolation steps, with --interpolate.")
    ] = 8,
    steps: Annotated[int | None, typer.Option(help="Forward passes of an image.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the Gumbel noise on confidences.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same images.")] = 0,
    interpolate: Annotated[
        bool, typer.Option("--interpolate", help="Interpolate from the first of two classes to the second.")
    ] = False,
    image: Annotated[str | None, typer.Option(help="Image to inpaint.")] = None,
    mask: Annotated[str | None, typer.Option(help="Mask for --image; white pixels are generated.")] = None,
    weights: WeightsOption = "ema",
) -> None:
    """Generate class-conditional images, or inpaint part of an image."""
    from bsq_ray.evaluation.generation.sample import GenerateRequest, generate_files

    request = GenerateRequest(
        classes=parse_ints(classes, "--classes"),
        count=num_images,
        seed=seed,
        sampling=drop_none(steps=steps, guidance_scale=guidance_scale, temperature=temperature),
        interpolate=interpolate,
        image=image,
        mask=mask,
    )
    num_images = generate_files(model, out, request, weights=parse_weights(weights))
    print(f"wrote {num_images} images and sheet.png to {out}")


def reconstruct(
    source: Annotated[str, typer.Argument(metavar="IN", help="Image, or video of any length.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file: .png for an image, .mp4 for a video.")],
    model: Annotated[
        str | None, typer.Option(help="Model folder or name of a shipped model. Default: the model photo.")
    ] = None,
    weights: WeightsOption = "ema",
) -> None:
    """Encode and decode one image or video."""
    from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_clip, reconstruct_file
    from bsq_ray.shipped_models.catalog import DEFAULT_TOKENIZER, default_model_folder

    weights_kind = parse_weights(weights)
    model = model or default_model_folder(DEFAULT_TOKENIZER)
    if out.suffix.lower() != ".mp4":
        print(reconstruct_file(model, source, out, weights=weights_kind))
        return
    with ProgressBar("reconstructing") as on_progress:
        summary = reconstruct_clip(model, source, out, weights=weights_kind, on_progress=on_progress)
    print(summary)


def compress(
    source: Annotated[str, typer.Argument(metavar="IN", help="Image or video, or - for stdin.")],
    out: Annotated[str, typer.Argument(metavar="OUT.bsq", help="Output file, or - for stdout.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder of a prior or of a tokenizer (raw bits), or name of a shipped model. "
            "Default: the model photo-prior."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(min=1, help="Nested bits: bits per token to store. Default: all.")] = None,
    target_bytes: Annotated[
        int | None, typer.Option(min=1, help="Nested bits: store as many bits per token as fit into this file size.")
    ] = None,
    target_lpips: Annotated[
        float | None, typer.Option(help="Nested bits: store as few bits per token as reach this LPIPS (alex).")
    ] = None,
    weights: WeightsOption = "ema",
) -> None:
    """Compress an image or a video to a .bsq file."""
    from bsq_ray.codec.files import compress_file
    from bsq_ray.codec.rate import Rate
    from bsq_ray.shipped_models.catalog import DEFAULT_CODEC, default_model_folder

    rate = Rate(bits, target_bytes, target_lpips)
    model = model or default_model_folder(DEFAULT_CODEC)
    weights_kind = parse_weights(weights)
    with ProgressBar("compressing") as on_progress:
        summary = compress_file(model, source, out, weights=weights_kind, on_progress=on_progress, rate=rate)
    print(summary, file=sys.stderr)


def decompress(
    source: Annotated[str, typer.Argument(metavar="IN.bsq", help="Compressed file, or - for stdin.")],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Output file: .png or .webp; .mp4 or .mkv for a clip; - writes PNG or MKV to stdout."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model folder that compressed the file. Default: the shipped model that wrote the file."),
    ] = None,
    region: Annotated[str | None, typer.Option(help="Decode only this box: left,top,right,bottom in pixels.")] = None,
    frame: Annotated[int | None, typer.Option(help="Decode only the clip frame with this index, from 0.")] = None,
    seek: Annotated[float | None, typer.Option(help="Decode only the clip frame at this time, in seconds.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Decode the available part of a truncated file.")] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Reject images with more pixels than this.")] = 2**27,
    weights: WeightsOption = "ema",
) -> None:
    """Decompress a .bsq file."""
    from bsq_ray.codec.files import DecodeSelection, decompress_file

    box = None
    if region is not None:
        edges = parse_ints(region, "--region")
        if len(edges) != 4:
            raise ValueError(f"--region {region} is not four numbers; write left,top,right,bottom")
        box = edges[0], edges[1], edges[2], edges[3]
    selection = DecodeSelection(region=box, frame=frame, time_s=seek, preview=preview, max_pixels=max_pixels)
    weights_kind = parse_weights(weights)
    with ProgressBar("decompressing") as on_progress:
        summary = decompress_file(model, source, out, selection, weights=weights_kind, on_progress=on_progress)
    print(summary, file=sys.stderr)


def import_reference(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of the published reference code.")],
    config: Annotated[str, typer.Option(help="Preset name or YAML file of the same model.")],
    out: Annotated[str, typer.Option(help="Output model folder.")],
    weights: WeightsOption = "ema",
) -> None:
    """Convert a checkpoint of the published reference code to a model folder. Pickled code is never executed."""
    from bsq_ray.import_bsq_vit import import_bsq_vit as convert

    imported_model = convert(checkpoint, config, out, weights=parse_weights(weights))
    steps = f" ({imported_model.iteration} training steps)" if imported_model.iteration is not None else ""
    print(f"imported model {imported_model.model_id[:12]}{steps} to {out}")


def info(
    source: Annotated[str, typer.Argument(help="Folder, URL or preset name.")],
) -> None:
    """Describe a model folder, run folder, data set, token table or preset."""
    from bsq_ray.cli.info import format_info

    print(format_info(source))
