"""Pack images or videos into WebDataset shards with a manifest, in parallel.

    folder, tars, Parquet ─list, shuffle─▶ plan of shards ─one task each: decode, check, write─▶ shard-000000.tar …
                                                                                          all ─▶ manifest.parquet

The manifest is written last, so an interrupted run never leaves a data set that looks complete. The same command
resumes it: finished shards are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from bsq_ray import storage
from bsq_ray.data.duplicate_report import find_near_duplicates
from bsq_ray.data.file_list import IgnoredFiles, list_files
from bsq_ray.data.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from bsq_ray.data.pack_containers import find_containers, list_containers
from bsq_ray.data.pack_labels import label_names, number_labels
from bsq_ray.data.pack_shard import EncodeFn, ShardPacker
from bsq_ray.data.pack_source import FileSource, SourceFiles
from bsq_ray.data.packing import new_packing
from bsq_ray.data.transcode import reencode_image, transcode_if_needed
from bsq_ray.media.images import IMAGE_SUFFIXES
from bsq_ray.media.video_reader import VIDEO_SUFFIXES
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress
from bsq_ray.runtime.task_map import task_map

# Minimum of `PackOptions.max_side`, in pixels.
_MIN_MAX_SIDE = 8


@dataclass(frozen=True)
class PackOptions:
    """Options of `pack_images` and `pack_videos`.

    Attributes:
        shard_mb: size of a shard, millions of bytes.
        max_side: longest side, pixels. Larger images and videos are downscaled to it (Lanczos); None keeps the size.
        min_frames: videos with fewer frames are skipped.
        seed: seed of the shuffle that distributes files over shards.
        split_list: text file that lists the files to pack, see `list_files`; None packs all files.
        label_file: text file with the class of each image, see `label_names`; None takes folders or stored labels.
        near_duplicates_of: packed data set to compare with, such as the training set of a held-out set; the destination
            itself finds copies within it. None compares nothing.
        num_workers: number of parallel Ray tasks; 0 packs in this process, None uses all CPUs of the cluster.
        address: address of a Ray cluster; None starts Ray on this node.
        storage_timeout_s: seconds to retry unavailable storage before packing fails.
    """

    shard_mb: float = 100.0
    max_side: int | None = None
    min_frames: int = 16
    seed: int = 0
    split_list: str | None = None
    label_file: str | None = None
    near_duplicates_of: str | None = None
    num_workers: int | None = None
    address: str | None = None
    storage_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.shard_mb <= 0:
            raise ValueError(f"shard size {self.shard_mb} MB must be positive")
        if self.max_side is not None and self.max_side < _MIN_MAX_SIDE:
            raise ValueError(f"longest side {self.max_side} is too small; use at least {_MIN_MAX_SIDE} pixels")
        if self.min_frames < 1:
            raise ValueError(f"min_frames {self.min_frames} must be 1 or more")


@dataclass
class PackReport:
    """The result of packing a folder.

    Attributes:
        manifest: the data set.
        damaged_files: "file: reason" of each file that could not be decoded.
        too_short_files: "file: reason" of each video with too few frames.
        changed_files: "file: change" of each video whose variable frame rate was converted to a constant one.
        ignored: what else the folder contains: files of other types, leftovers, broken links.
        retries: messages of storage errors before a retry succeeded.
        num_reused_shards: number of shards that an interrupted run had packed.
        near_duplicates: "key: like KEY of URL (correlation)" of each sample that the compared data set contains, too.
    """

    manifest: Manifest
    damaged_files: list[str] = field(default_factory=list)
    too_short_files: list[str] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    ignored: IgnoredFiles = field(default_factory=lambda: IgnoredFiles("images"))
    retries: list[str] = field(default_factory=list)
    num_reused_shards: int = 0
    near_duplicates: list[str] = field(default_factory=list)


def pack_images(
    source: str,
    destination: str,
    options: PackOptions = PackOptions(),
    on_progress: ProgressCallback = no_progress,
) -> PackReport:
    """Pack a folder of images, with or without class subfolders, or images in tars or Parquet files.

    The first folder level names the classes; without subfolders all images have the class "all". Files that cannot be
    decoded are listed in `damaged.txt` next to the shards; all others are packed.

    Args:
        source: folder, tar, Parquet file or pattern with `*`, as path or fsspec URL; see `pack_containers`.
        destination: folder of the shards.
        options: see `PackOptions`.
        on_progress: called with the number of finished files and the total number of files.

    Raises:
        ValueError: the folder is missing or has no readable images, the destination already contains a data set,
            or storage fails.
    """
    encode = partial(reencode_image, max_side=options.max_side)
    return _pack(source, destination, "images", IMAGE_SUFFIXES, encode, options, on_progress)


def pack_videos(
    source: str,
    destination: str,
    options: PackOptions = PackOptions(),
    on_progress: ProgressCallback = no_progress,
) -> PackReport:
    """Pack a folder of videos, like `pack_images`.

    Every video is decoded once. Damaged videos are skipped and listed in `damaged.txt`, short ones in `too-short.txt`.
    Videos with a variable frame rate are stored at a constant one and listed in `changed.txt`.

    Args:
        source, destination, options, on_progress: as in `pack_images`.

    Raises:
        ValueError: the folder is missing or has no usable videos, the destination already contains a data set,
            or storage fails.
    """
    encode = partial(transcode_if_needed, max_side=options.max_side, min_frames=options.min_frames)
    return _pack(source, destination, "videos", VIDEO_SUFFIXES, encode, options, on_progress)


def _pack(
    source: str,
    destination: str,
    kind: str,
    suffixes: tuple[str, ...],
    encode: EncodeFn,
    options: PackOptions,
    on_progress: ProgressCallback,
) -> PackReport:
    # Tasks may have another working folder.
    source, destination = storage.absolute(source), storage.absolute(destination)
    if storage.exists(storage.join(destination, MANIFEST_FILE)):
        raise ValueError(f"{destination} already has a packed data set; choose another folder or remove it first")
    compared_url = options.near_duplicates_of
    # A wrong URL is reported before the work.
    compared = None if compared_url in (None, destination) else read_manifest(compared_url or "")
    files, ignored = _list_sources(source, kind, suffixes, options)
    options_key = f"max_side {options.max_side} min_frames {options.min_frames}"
    pack_shard = ShardPacker(destination, encode, options_key, kind, options.storage_timeout_s)
    results, done = [], 0
    for result in task_map(pack_shard, _iter_shards(files, options), options.num_workers, options.address):
        results.append(result)
        done += result.num_files
        on_progress(done, len(files))
    damaged = sorted(line for result in results for line in result.damaged_files)
    too_short = sorted(line for result in results for line in result.too_short_files)
    changed = sorted(line for result in results for line in result.changed_files)
    rows = sorted((result.row for result in results if result.row is not None), key=lambda row: row.name)
    if not rows:
        requirement = "can be decoded" if damaged else "is long enough"
        first_error = (damaged + too_short)[0]
        raise ValueError(f"none of the {len(files)} {kind} in {source} {requirement}; first error: {first_error}")
    for name, lines in {"damaged": damaged, "too-short": too_short, "changed": changed}.items():
        if lines:
            storage.write_text(storage.join(destination, f"{name}.txt"), "\n".join(lines) + "\n")
    packing = new_packing(kind, options.max_side)
    manifest = write_manifest(destination, rows, files.classes, kind, has_content_digests=True, packing=packing)
    copies = [] if compared_url is None else find_near_duplicates(manifest, compared or manifest)
    if copies:
        storage.write_text(storage.join(destination, "near-duplicates.txt"), "\n".join(copies) + "\n")
    retries = [line for result in results for line in result.retries]
    num_reused = sum(result.is_reused for result in results)
    return PackReport(manifest, damaged, too_short, changed, ignored, retries, num_reused, copies)


def _list_sources(
    source: str, kind: str, suffixes: tuple[str, ...], options: PackOptions
) -> tuple[SourceFiles, IgnoredFiles]:
    """Return the files of a folder, of tars or of Parquet files, and what else a folder contains."""
    containers, ignored = find_containers(source) if kind == "images" else ([], IgnoredFiles(kind))
    if containers:
        if options.split_list is not None:
            raise ValueError("a split list names files of a folder; it cannot be used with tars or Parquet files")
        files, ignored_members = list_containers(containers, suffixes, options.label_file)
        ignored.add(ignored_members)
        return files, ignored
    listed = list_files(source, kind, suffixes, options.split_list)
    labels_F, classes = listed.labels_F, listed.classes
    if options.label_file is not None:
        labels_F, classes = number_labels(label_names(options.label_file, listed.urls))
    return SourceFiles(listed.names, labels_F, listed.sizes_F, classes, prefix=listed.prefix), listed.ignored


def _iter_shards(files: SourceFiles, options: PackOptions) -> Iterator[tuple[str, list[FileSource]]]:
    """Yield the name and the files of each shard; the files are shuffled over the shards."""
    order_F = files.shuffled(options.seed)
    sizes_F = files.sizes_F[order_F]
    first, shard_bytes, number = 0, 0, 0
    for position, size in enumerate(sizes_F.tolist()):
        if position > first and shard_bytes + size > options.shard_mb * 1e6:
            yield _shard_name(number), [files.file(n) for n in order_F[first:position].tolist()]
            first, shard_bytes, number = position, 0, number + 1
        shard_bytes += size
    yield _shard_name(number), [files.file(n) for n in order_F[first:].tolist()]


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"
