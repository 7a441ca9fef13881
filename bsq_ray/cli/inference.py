"""Commands that use a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bsq_ray.cli.options import Weights, given, numbers, progress_bar, which_weights


def generate(
    model: Annotated[str, typer.Option(help="Model folder of a masked language model.")],
    out: Annotated[str, typer.Option(help="Folder for the images.")],
    classes: Annotated[str, typer.Option(help="Numbers of classes, such as 1,2; default: all.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Images of each class.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Forward passes of an image.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the noise on confidences.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    between: Annotated[bool, typer.Option("--between", help="Go from the first of two classes to the second.")] = False,
    image: Annotated[str | None, typer.Option(help="An image to fill in.")] = None,
    mask: Annotated[str | None, typer.Option(help="White where the image is to be drawn anew.")] = None,
    weights: Weights = "ema",
) -> None:
    """Draw images of classes, or fill in a part of one."""
    from bsq_ray.evaluation.generation.sample import Request, draw

    changes = given(steps=steps, guidance=guidance, temperature=temperature)
    request = Request(numbers(classes, "--classes"), count, seed, changes, between, image, mask)
    written = draw(model, out, request, which_weights(weights))
    print(f"{written} images and sheet.png in {out}")


def reconstruct(
    model: Annotated[str, typer.Option(help="Model folder.")],
    source: Annotated[str, typer.Argument(metavar="IN", help="An image, or a video of any length.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where it goes: .png of an image, .mp4 of a video.")],
    weights: Weights = "ema",
) -> None:
    """Encode and decode one image or video."""
    from bsq_ray.evaluation.reconstruction.reconstruct_file import reconstruct_clip, reconstruct_file

    if out.suffix.lower() != ".mp4":
        print(reconstruct_file(model, source, out, which_weights(weights)))
        return
    with progress_bar("reconstructing") as bar:
        told = reconstruct_clip(model, source, out, which_weights(weights), bar)
    print(told)


def compress(
    model: Annotated[str, typer.Option(help="Model folder of a prior, or of a tokenizer (raw bits).")],
    source: Annotated[str, typer.Argument(metavar="IN", help="An image or video, or - for the standard input.")],
    out: Annotated[str, typer.Argument(metavar="OUT.bsq", help="The file, or - for the standard output.")],
    weights: Weights = "ema",
) -> None:
    """Compress an image or a video."""
    from bsq_ray.codec.files import compress_file

    with progress_bar("compressing") as bar:
        told = compress_file(model, source, out, which_weights(weights), bar)
    print(told, file=sys.stderr)


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
    weights: Weights = "ema",
) -> None:
    """Decompress a .bsq file."""
    from bsq_ray.codec.files import DecodeSelection, decompress_file

    box = None
    if region is not None:
        edges = numbers(region, "--region")
        if len(edges) != 4:
            raise ValueError(f"--region {region} are not four numbers: left,top,right,bottom")
        box = edges[0], edges[1], edges[2], edges[3]
    part = DecodeSelection(box, frame, seek, preview, max_pixels)
    with progress_bar("decompressing") as bar:
        told = decompress_file(model, source, out, part, which_weights(weights), bar)
    print(told, file=sys.stderr)


def import_reference(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint of the published reference code.")],
    config: Annotated[str, typer.Option(help="Preset of the same model.")],
    out: Annotated[str, typer.Option(help="Model folder to write.")],
    weights: Weights = "ema",
) -> None:
    """Turn a checkpoint of the published reference code into a model folder, without running what it pickles."""
    from bsq_ray.import_bsq_vit import import_bsq_vit as convert

    imported = convert(checkpoint, config, out, which_weights(weights))
    steps = f", {imported.iteration} steps" if imported.iteration is not None else ""
    print(f"imported model {imported.model_id[:12]}{steps} to {out}")


def info(
    what: Annotated[str, typer.Argument(metavar="M", help="Model or run folder, data set, token table or preset.")],
) -> None:
    """Say what a folder or preset is."""
    from bsq_ray.evaluation.reconstruction.reconstruct_file import describe

    print(describe(what))
