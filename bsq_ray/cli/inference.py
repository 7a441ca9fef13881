"""Commands that use a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bsq_ray.cli.options import WeightsOption, drop_none, parse_ints, parse_weights, progress_bar


def generate(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    out: Annotated[str, typer.Option(help="Folder for the images.")],
    classes: Annotated[str, typer.Option(help="Numbers of classes, such as 1,2; default: all.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Forward passes of an image.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the noise on confidences.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    interpolate: Annotated[
        bool, typer.Option("--between", help="Go from the first of two classes to the second.")
    ] = False,
    image: Annotated[str | None, typer.Option(help="An image to fill in.")] = None,
    mask: Annotated[str | None, typer.Option(help="White where the image is to be drawn anew.")] = None,
    weights: WeightsOption = "ema",
) -> None:
    """Draw images of classes, or fill in a part of one."""
    from bsq_ray.evaluation.generation.sample import GenerateRequest, generate_files

    sampling_overrides = drop_none(steps=steps, guidance=guidance, temperature=temperature)
    request = GenerateRequest(
        parse_ints(classes, "--classes"), count, seed, sampling_overrides, interpolate, image, mask
    )
    num_images = generate_files(model, out, request, parse_weights(weights))
    print(f"{num_images} images and sheet.png in {out}")


def reconstruct(
    model: Annotated[str, typer.Option(help="Model folder.")],
    source: Annotated[str, typer.Argument(metavar="IN", help="An image, or a video of any length.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where it goes: .png of an image, .mp4 of a video.")],
    weights: WeightsOption = "ema",
) -> None:
    """Encode and decode one image or video."""
    from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_clip, reconstruct_file

    if out.suffix.lower() != ".mp4":
        print(reconstruct_file(model, source, out, parse_weights(weights)))
        return
    with progress_bar("reconstructing") as on_progress:
        summary = reconstruct_clip(model, source, out, parse_weights(weights), on_progress)
    print(summary)


def compress(
    model: Annotated[str, typer.Option(help="Model folder of a prior, or of a tokenizer (raw bits).")],
    source: Annotated[str, typer.Argument(metavar="IN", help="An image or video, or - for the standard input.")],
    out: Annotated[str, typer.Argument(metavar="OUT.bsq", help="The file, or - for the standard output.")],
    weights: WeightsOption = "ema",
) -> None:
    """Compress an image or a video."""
    from bsq_ray.codec.files import compress_file

    with progress_bar("compressing") as on_progress:
        summary = compress_file(model, source, out, parse_weights(weights), on_progress)
    print(summary, file=sys.stderr)


def decompress(
    model: Annotated[str, typer.Option(help="The model folder that the file was written with.")],
    source: Annotated[str, typer.Argument(metavar="IN.bsq", help="The file, or - for the standard input.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help=".png or .webp; .mp4 or .mkv for a clip; - for PNG or MKV to a pipe.")
    ],
    region: Annotated[str | None, typer.Option(help="left,top,right,bottom in pixels: only this part.")] = None,
    frame: Annotated[int | None, typer.Option(help="Of a clip only this frame, from 0.")] = None,
    seek: Annotated[float | None, typer.Option(help="Of a clip only the frame at this second.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show what is there of a file that is cut off.")] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger images are refused.")] = 2**27,
    weights: WeightsOption = "ema",
) -> None:
    """Decompress a .bsq file."""
    from bsq_ray.codec.files import DecodeSelection, decompress_file

    box = None
    if region is not None:
        edges = parse_ints(region, "--region")
        if len(edges) != 4:
            raise ValueError(f"--region {region} are not four numbers: left,top,right,bottom")
        box = edges[0], edges[1], edges[2], edges[3]
    selection = DecodeSelection(box, frame, seek, preview, max_pixels)
    with progress_bar("decompressing") as on_progress:
        summary = decompress_file(model, source, out, selection, parse_weights(weights), on_progress)
    print(summary, file=sys.stderr)


def import_reference(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of the published reference code.")],
    config: Annotated[str, typer.Option(help="Preset of the same model.")],
    out: Annotated[str, typer.Option(help="Model folder to write.")],
    weights: WeightsOption = "ema",
) -> None:
    """Turn a checkpoint of the published reference code into a model folder, without running what it pickles."""
    from bsq_ray.import_bsq_vit import import_bsq_vit as convert

    imported_model = convert(checkpoint, config, out, parse_weights(weights))
    steps = f", {imported_model.iteration} steps" if imported_model.iteration is not None else ""
    print(f"imported model {imported_model.model_id[:12]}{steps} to {out}")


def info(
    source: Annotated[str, typer.Argument(metavar="M", help="Model or run folder, data set, token table or preset.")],
) -> None:
    """Say what a folder or preset is."""
    from bsq_ray.evaluation.reconstruction.reconstruct_file import format_info

    print(format_info(source))
