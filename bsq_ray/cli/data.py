"""Commands on data: pack, index, inspect, tokenize."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.options import AddressOption, drop_none, progress_bar


def data_pack(
    src: Annotated[str, typer.Argument(help="Folder or URL of files; its first level of folders names the classes.")],
    dest: Annotated[str, typer.Argument(help="Folder or URL for the shards.")],
    kind: Annotated[str, typer.Option(help="images or videos.")] = "images",
    split_list: Annotated[
        str | None, typer.Option("--list", help="Take the files that this UCF-101 list names.")
    ] = None,
    shard_mb: Annotated[float, typer.Option(help="Size of a shard, MB.")] = 100.0,
    max_side: Annotated[int | None, typer.Option(help="Shrink images or videos with a longer side to it.")] = None,
    min_frames: Annotated[int | None, typer.Option(help="Leave out videos with fewer frames; default 16.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle over shards.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Tasks at once; 0 packs without Ray.")] = None,
    address: AddressOption = None,
) -> None:
    """Pack a folder of images or videos into WebDataset shards with a manifest."""
    from bsq_ray.data.pack import pack_images, pack_videos

    if kind not in ("images", "videos"):
        raise ValueError(f"--kind {kind} is not known; choose images or videos")
    if kind == "images" and min_frames is not None:
        raise ValueError("--min-frames is for videos; add --kind videos")
    with progress_bar("packing") as on_progress:
        arguments = (src, dest, shard_mb, max_side, seed, workers, address, on_progress, split_list)
        report = (
            pack_images(*arguments) if kind == "images" else pack_videos(*arguments, **drop_none(min_frames=min_frames))
        )
    manifest = report.manifest
    print(f"{kind} {manifest.num_samples}, shards {len(manifest.shards)}, classes {len(manifest.classes)}, in {dest}")
    if report.damaged:
        print(f"could not be decoded: {len(report.damaged)}, listed in {dest}/damaged.txt")
    if report.too_short:
        print(f"too short: {len(report.too_short)}, listed in {dest}/too-short.txt")
    if report.changed:
        print(f"of variable rate, now of a constant one: {len(report.changed)}, listed in {dest}/changed.txt")
    if report.num_ignored:
        print(f"left out, for they are no {kind}: {report.num_ignored}")


def data_index(url: Annotated[str, typer.Argument(help="Folder or URL of WebDataset .tar shards.")]) -> None:
    """Write the manifest for WebDataset shards that were made elsewhere."""
    from bsq_ray.data.index import index_shards

    with progress_bar("indexing") as on_progress:
        manifest = index_shards(url, on_progress)
    print(f"{manifest.num_samples} {manifest.kind} in {len(manifest.shards)} shards; wrote {url}/manifest.parquet")


def data_inspect(
    dest: Annotated[str, typer.Argument(help="Folder or URL of packed shards.")],
    sheet: Annotated[str, typer.Option(help="Where the contact sheet goes.")] = "contact-sheet.png",
) -> None:
    """Count, check and show a packed data set."""
    from bsq_ray.data.inspect import inspect_shards

    inspection = inspect_shards(dest, sheet)
    manifest = inspection.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{manifest.num_samples} {manifest.kind}, {len(manifest.shards)} shards, {size:.1f} MB, hash {manifest.hash[:12]}"
    )
    for name, count in sorted(inspection.class_counts.items(), key=lambda item: -item[1])[:20]:
        print(f"  {name}: {count}")
    if len(inspection.class_counts) > 20:
        print(f"  and {len(inspection.class_counts) - 20} more classes")
    if inspection.num_measured:
        for side, (low, median, high) in {"width": inspection.widths, "height": inspection.heights}.items():
            print(f"{side} {low} to {high} px, median {median} ({inspection.num_measured} {manifest.kind} measured)")
    if manifest.kind == "videos":
        low, median, high = inspection.frame_counts
        print(
            f"frames {low} to {high}, median {median}; {inspection.total_duration_s / 60:.1f} minutes in all, {inspection.frame_rates}"
        )
    print(f"contact sheet: {sheet}" if inspection.num_measured else f"no contact sheet: no {manifest.kind} can be read")
    for fault in inspection.errors:
        print(f"fault: {fault}")
    if inspection.errors:
        raise RuntimeError(f"{dest} has {len(inspection.errors)} faults, listed above")


def tokenize_images(
    model: Annotated[str, typer.Option(help="Model folder of a tokenizer.")],
    data: Annotated[str, typer.Option(help="Packed images or videos.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the token table.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 works without Ray.")] = 1,
    num_crops: Annotated[
        int, typer.Option(min=1, help="Rows of each image or clip: its centre, then random crops.")
    ] = 1,
    scale: Annotated[
        float, typer.Option(min=1.0, help="Random crops come from images up to so many times larger.")
    ] = 1.25,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the random crops.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random crops.")] = 0,
    address: AddressOption = None,
) -> None:
    """Turn packed images or videos into a token table; what is already there is not done again."""
    from bsq_ray.data.tokenize import tokenize

    with progress_bar("tokenizing") as on_progress:
        result = tokenize(model, data, out, workers, address, num_crops, scale, flip, batch_size, seed, on_progress)
    print(f"{result.table.num_rows} rows in {len(result.table.parts)} parts ({result.num_written} made now) in {out}")
    for line in result.skipped:
        print(f"left out: {line}")
