"""Commands for data: pack, index, inspect, tokenize."""

from __future__ import annotations

from typing import Annotated

import typer

from bsq_ray.cli.extras import require_extra
from bsq_ray.cli.options import AddressOption, ProgressBar, announce_ray, drop_none

_MAX_LISTED_CLASSES = 20


def data_pack(
    src: Annotated[
        str,
        typer.Argument(help="Folder of files; its subfolders are the classes. Or tars or Parquet files of images."),
    ],
    dest: Annotated[str, typer.Argument(help="Folder or URL of the shards.")],
    kind: Annotated[str, typer.Option(help="images or videos.")] = "images",
    split_list: Annotated[
        str | None, typer.Option("--list", help="UCF-101 split list; only its files are packed.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Text file with a class per image, or a file name and its class per line."),
    ] = None,
    shard_mb: Annotated[float, typer.Option(help="Size of a shard, MB.")] = 100.0,
    max_side: Annotated[int | None, typer.Option(help="Shrink images or videos to this longer side, pixels.")] = None,
    min_frames: Annotated[int | None, typer.Option(help="Skip videos with fewer frames. Default: 16.")] = None,
    near_duplicates_of: Annotated[
        str | None, typer.Option(help="Packed data set; list what it contains, too. DEST lists copies within.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle over shards.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Concurrent tasks. 0 packs without Ray.")] = None,
    address: AddressOption = None,
) -> None:
    """Pack images or videos into WebDataset shards with a manifest. Finished shards are not repeated."""
    if kind not in ("images", "videos"):
        raise ValueError(f"unknown --kind {kind}; choose images or videos")
    if kind == "videos" and labels is not None:
        raise ValueError("--labels is for images; the folders or the split list name the classes of videos")
    if kind == "images" and min_frames is not None:
        raise ValueError("--min-frames is for videos; add --kind videos")
    more_packages = (() if workers == 0 else ("ray",)) + (() if near_duplicates_of is None else ("scipy",))
    require_extra("data pack", "train", *more_packages)

    from bsq_ray.data.pack import PackOptions, pack_images, pack_videos

    options = PackOptions(
        shard_mb=shard_mb,
        max_side=max_side,
        seed=seed,
        split_list=split_list,
        label_file=labels,
        near_duplicates_of=near_duplicates_of,
        num_workers=workers,
        address=address,
        **drop_none(min_frames=min_frames),
    )
    pack = pack_images if kind == "images" else pack_videos
    with ProgressBar("packing") as on_progress:
        report = pack(src, dest, options, on_progress)
    manifest = report.manifest
    print(f"{kind} {manifest.num_samples}, shards {manifest.num_shards}, classes {len(manifest.classes)}, in {dest}")
    if report.num_reused_shards:
        print(f"kept {report.num_reused_shards} shards of an interrupted run")
    if report.damaged_files:
        print(f"skipped {len(report.damaged_files)} that cannot be decoded, listed in {dest}/damaged.txt")
    if report.too_short_files:
        print(f"skipped {len(report.too_short_files)} that are too short, listed in {dest}/too-short.txt")
    if report.changed_files:
        print(f"converted {len(report.changed_files)} to a constant frame rate, listed in {dest}/changed.txt")
    if near_duplicates_of is not None:
        listed = f", listed in {dest}/near-duplicates.txt" if report.near_duplicates else ""
        print(f"near-duplicates in {near_duplicates_of}: {len(report.near_duplicates)}{listed}")
    for line in report.ignored.describe():
        print(f"ignored {line}")


def data_index(
    url: Annotated[str, typer.Argument(help="Folder or URL of WebDataset .tar shards.")],
    key_until: Annotated[
        str, typer.Option(help="End of the key in the name of a file: first-dot, as in webdataset, or last-dot.")
    ] = "first-dot",
    label_field: Annotated[
        str | None, typer.Option(help="Field of the .json files with the label. Default: label, class, cls, …")
    ] = None,
    class_list: Annotated[
        str | None, typer.Option(help="Text file of the classes, one per line. Default: the labels that occur.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Concurrent Ray tasks. 0 indexes without Ray.")] = 0,
    address: AddressOption = None,
) -> None:
    """Write the manifest of WebDataset shards that another program made."""
    if key_until not in ("first-dot", "last-dot"):
        raise ValueError(f"unknown --key-until {key_until}; choose first-dot or last-dot")
    require_extra("data index", "train", *(("ray",) if workers else ()))

    from bsq_ray.data.index import index_shards
    from bsq_ray.data.index_shard import IndexOptions

    options = IndexOptions(key_until, label_field, class_list, workers, address)  # type: ignore[arg-type]
    with ProgressBar("indexing") as on_progress:
        report = index_shards(url, options, on_progress)
    manifest = report.manifest
    counts = f"{manifest.num_samples} {manifest.kind}, shards {manifest.num_shards}, classes {len(manifest.classes)}"
    print(f"{counts}; wrote {url}/manifest.parquet")
    if report.class_rule:
        print(report.class_rule)
    if report.unused:
        print(f"not used {report.unused.total()} of {report.num_members} files in the shards:")
        for line in report.describe_unused():
            print(f"  {line}")
    for note in report.notes:
        print(f"note: {note}")


def data_inspect(
    dest: Annotated[str, typer.Argument(help="Folder or URL of packed shards.")],
    sheet: Annotated[str, typer.Option(help="PNG file of the contact sheet.")] = "contact-sheet.png",
) -> None:
    """Count and check a packed data set, and write a contact sheet."""
    require_extra("data inspect", "train")

    from bsq_ray.data.inspect import inspect_shards

    inspection = inspect_shards(dest, sheet)
    manifest = inspection.manifest
    size_mb = manifest.num_bytes / 1e6
    num_shards = manifest.num_shards
    print(f"{manifest.num_samples} {manifest.kind}, {num_shards} shards, {size_mb:.1f} MB, hash {manifest.hash[:12]}")
    for name, count in sorted(inspection.class_counts.items(), key=lambda item: -item[1])[:_MAX_LISTED_CLASSES]:
        print(f"  {name}: {count}")
    if len(inspection.class_counts) > _MAX_LISTED_CLASSES:
        print(f"  and {len(inspection.class_counts) - _MAX_LISTED_CLASSES} more classes")
    if inspection.num_measured:
        for side, (low, median, high) in {"width": inspection.widths, "height": inspection.heights}.items():
            print(f"{side} {low} to {high} px, median {median} ({inspection.num_measured} {manifest.kind} measured)")
    if manifest.kind == "videos":
        low, median, high = inspection.frame_counts
        minutes = inspection.total_duration_s / 60
        print(f"frames {low} to {high}, median {median}; {minutes:.1f} minutes in total, {inspection.frame_rates}")
    print(f"contact sheet: {sheet}" if inspection.num_measured else f"no contact sheet: no readable {manifest.kind}")
    for error in inspection.errors:
        print(f"error: {error}")
    if inspection.errors:
        raise RuntimeError(f"{dest} has {len(inspection.errors)} errors, listed above")


def tokenize_images(
    model: Annotated[str, typer.Option(help="Model folder of a tokenizer.")],
    data: Annotated[str, typer.Option(help="Packed images or videos.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the token table.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes. 0 tokenizes without Ray.")] = 1,
    num_crops: Annotated[
        int, typer.Option(min=1, help="Rows of each image or clip: its center crop, then random crops.")
    ] = 1,
    scale: Annotated[
        float, typer.Option(min=1.0, help="Largest resize of an image before a random crop, as a factor.")
    ] = 1.25,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the random crops.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a batch.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the random crops.")] = 0,
    address: AddressOption = None,
) -> None:
    """Tokenize packed images or videos into a token table. Existing parts are not repeated."""
    require_extra("tokenize", "train", *(("ray",) if workers else ()))

    from bsq_ray.data.tokenize import tokenize

    announce_ray(workers, address)
    with ProgressBar("tokenizing") as on_progress:
        result = tokenize(
            model,
            data,
            out,
            num_workers=workers,
            address=address,
            num_crops=num_crops,
            scale=scale,
            flip=flip,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    print(f"{result.table.num_rows} rows in {len(result.table.parts)} parts ({result.num_written} new) in {out}")
    for line in result.skipped:
        print(f"skipped: {line}")
