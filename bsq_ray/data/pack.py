"""Pack a folder of images or videos into WebDataset shards with a manifest, in parallel.

    folder ─list, shuffle─▶ plan of shards ─one task each: decode, check, write─▶ shard-000000.tar … ─▶ manifest.parquet

The manifest is written last, so an interrupted run never leaves a data set that looks complete.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from bsq_ray import storage
from bsq_ray.data.file_list import IgnoredFiles, list_files
from bsq_ray.data.manifest import MANIFEST_FILE, Manifest, write_manifest
from bsq_ray.data.shard_index import SampleEntry, Shard, ShardRow, index_rows, shard_row, write_index
from bsq_ray.data.transcode import StoredFile, TooShortError, reencode_image, transcode_if_needed
from bsq_ray.media.images import DECODE_ERRORS, IMAGE_SUFFIXES, decode_error_text
from bsq_ray.media.video_reader import VIDEO_SUFFIXES
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress
from bsq_ray.runtime.ray_session import ray_session

_TAR_BLOCK_BYTES = 512
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
        num_workers: number of parallel Ray tasks; 0 packs in this process, None uses all CPUs of the cluster.
        address: address of a Ray cluster; None starts Ray on this node.
    """

    shard_mb: float = 100.0
    max_side: int | None = None
    min_frames: int = 16
    seed: int = 0
    split_list: str | None = None
    num_workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.shard_mb <= 0:
            raise ValueError(f"shard size {self.shard_mb} MB must be positive")
        if self.max_side is not None and self.max_side < _MIN_MAX_SIDE:
            raise ValueError(f"longest side {self.max_side} is too small; use at least {_MIN_MAX_SIDE} pixels")
        if self.min_frames < 1:
            raise ValueError(f"min_frames {self.min_frames} must be 1 or more")


@dataclass(frozen=True)
class FileSource:
    """A file to pack: its URL, its key in the data set, and its class index."""

    url: str
    key: str
    label: int


@dataclass
class PackReport:
    """The result of packing a folder.

    Attributes:
        manifest: the data set.
        damaged_files: "file: reason" of each file that could not be decoded.
        too_short_files: "file: reason" of each video with too few frames.
        changed_files: "file: change" of each video whose variable frame rate was converted to a constant one.
        ignored: what else the folder contains: files of other types, leftovers, broken links.
    """

    manifest: Manifest
    damaged_files: list[str] = field(default_factory=list)
    too_short_files: list[str] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    ignored: IgnoredFiles = field(default_factory=lambda: IgnoredFiles("images"))


# Maps the content of a file and its suffix to the stored file; raises ValueError if it cannot be decoded.
_EncodeFn = Callable[[bytes, str], StoredFile]


@dataclass
class _ShardResult:
    """Result of packing one shard: the shard, None if no file was usable, and a report on each problem."""

    num_files: int
    shard: ShardRow | None = None
    damaged_files: list[str] = field(default_factory=list)
    too_short_files: list[str] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    source: str
    kind: str
    shards: list[list[FileSource]]
    classes: tuple[str, ...]
    ignored: IgnoredFiles


def pack_images(
    source: str,
    destination: str,
    options: PackOptions = PackOptions(),
    on_progress: ProgressCallback = no_progress,
) -> PackReport:
    """Pack a folder of images, with or without class subfolders.

    The first folder level names the classes; without subfolders all images have the class "all". Files that cannot be
    decoded are listed in `damaged.txt` next to the shards; all others are packed.

    Args:
        source, destination: folders, as paths or fsspec URLs.
        options: see `PackOptions`.
        on_progress: called with the number of finished files and the total number of files.

    Raises:
        ValueError: the folder is missing or has no readable images, the destination already contains a data set,
            or storage fails.
    """
    encode = partial(_encode_image, max_side=options.max_side)
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


def _encode_image(data: bytes, suffix: str, max_side: int | None) -> StoredFile:
    try:
        return reencode_image(data, max_side)
    except DECODE_ERRORS as error:
        raise ValueError(decode_error_text(error)) from error


def _pack(
    source: str,
    destination: str,
    kind: str,
    suffixes: tuple[str, ...],
    encode: _EncodeFn,
    options: PackOptions,
    on_progress: ProgressCallback,
) -> PackReport:
    if storage.exists(storage.join(destination, MANIFEST_FILE)):
        raise ValueError(f"{destination} already has a packed data set; choose another folder or remove it first")
    plan = _make_plan(source, kind, suffixes, options)
    total, done = sum(map(len, plan.shards)), 0
    results: list[_ShardResult] = []
    for result in _pack_shards(plan.shards, destination, encode, options):
        results.append(result)
        done += result.num_files
        on_progress(done, total)
    shards = sorted((result.shard for result in results if result.shard is not None), key=lambda shard: shard.name)
    damaged = sorted(line for result in results for line in result.damaged_files)
    too_short = sorted(line for result in results for line in result.too_short_files)
    changed = sorted(line for result in results for line in result.changed_files)
    if not shards:
        requirement = "can be decoded" if damaged else "is long enough"
        raise ValueError(
            f"none of the {total} {plan.kind} in {plan.source} {requirement}; first error: {(damaged + too_short)[0]}"
        )
    for name, lines in {"damaged": damaged, "too-short": too_short, "changed": changed}.items():
        if lines:
            storage.write_text(storage.join(destination, f"{name}.txt"), "\n".join(lines) + "\n")
    manifest = write_manifest(destination, shards, plan.classes, plan.kind, has_content_digests=True)
    return PackReport(manifest, damaged, too_short, changed, plan.ignored)


def _make_plan(source: str, kind: str, suffixes: tuple[str, ...], options: PackOptions) -> _Plan:
    """Distribute the shuffled files of a folder over shards."""
    file_list = list_files(source, kind, suffixes, options.split_list)
    shards: list[list[FileSource]] = [[]]
    shard_bytes = 0
    for index in np.random.default_rng(options.seed).permutation(len(file_list.urls)):
        url, size = file_list.urls[index], file_list.sizes[index]
        if shards[-1] and shard_bytes + size > options.shard_mb * 1e6:
            shards.append([])
            shard_bytes = 0
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", posixpath.splitext(posixpath.basename(url))[0])[:40]
        shards[-1].append(FileSource(url, f"{index:08d}_{slug}", file_list.labels[index]))
        shard_bytes += size
    return _Plan(source, kind, shards, file_list.classes, file_list.ignored)


def _pack_shards(
    shards: list[list[FileSource]], destination: str, encode: _EncodeFn, options: PackOptions
) -> Iterator[_ShardResult]:
    """Pack every shard, in this process or by Ray tasks, and yield each result when it is ready."""
    shard_arguments = [
        (f"shard-{number:06d}.tar", sources, destination, encode) for number, sources in enumerate(shards)
    ]
    if options.num_workers == 0:
        for task_arguments in shard_arguments:
            yield _pack_shard(*task_arguments)
        return
    with ray_session(options.address):
        import ray

        max_in_flight = options.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1)(_pack_shard)
        pending = list(reversed(shard_arguments))
        running = [task.remote(*pending.pop()) for _ in range(min(max_in_flight, len(shard_arguments)))]
        while running:
            [ready], running = ray.wait(running, num_returns=1)
            if pending:
                running.append(task.remote(*pending.pop()))
            yield ray.get(ready)


def _pack_shard(name: str, sources: list[FileSource], destination: str, encode: _EncodeFn) -> _ShardResult:
    """Encode the files of one shard and write it; damaged and short files are skipped."""
    result = _ShardResult(len(sources))
    archive = io.BytesIO()
    samples: list[tuple[FileSource, int, StoredFile]] = []
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for source in sources:
            try:
                encoded = encode(storage.read_bytes(source.url), posixpath.splitext(source.url)[1][1:].lower())
            except TooShortError as error:
                result.too_short_files.append(f"{source.url}: {error}")
                continue
            except storage.StorageUnavailableError:
                # The file may be intact, so a data set without it would be incomplete.
                raise
            except ValueError as error:
                result.damaged_files.append(f"{source.url}: {error}")
                continue
            if encoded.change:
                result.changed_files.append(f"{source.url}: {encoded.change}")
            samples.append((source, archive.tell() + _TAR_BLOCK_BYTES, encoded))
            _add_member(tar, f"{source.key}.{encoded.suffix}", encoded.data)
            _add_member(tar, f"{source.key}.cls", str(source.label).encode())
    if samples:
        content = archive.getvalue()
        storage.write_bytes(storage.join(destination, name), content)
        entries = [
            SampleEntry(source.key, source.label, offset, len(encoded.data)) for source, offset, encoded in samples
        ]
        videos = [encoded.video for _, _, encoded in samples if encoded.video is not None]
        rows = index_rows(entries, videos or None)
        shard = Shard(name, len(content), hashlib.sha256(content).hexdigest(), rows)
        result.shard = shard_row(shard, write_index(destination, shard))
    return result


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
