"""A folder of images or videos to WebDataset shards and their manifest, in parallel.

    folder ─list, shuffle─▶ plan of shards ─one task each: decode, limit, write─▶ shard-000000.tar … ─▶ manifest.parquet

The manifest is written last, so an interrupted packing leaves no data set that looks whole.
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
from typing import NamedTuple

import numpy as np

from bsq_ray import storage
from bsq_ray.data.file_list import list_files
from bsq_ray.data.manifest import MANIFEST_FILE, Manifest, Shard, VideoInfo, write_manifest
from bsq_ray.data.transcode import TooShortError, transcode_if_needed
from bsq_ray.data.transforms import DECODE_ERRORS, IMAGE_SUFFIXES, decode_error_text, reencode_image
from bsq_ray.media.video_reader import VIDEO_SUFFIXES
from bsq_ray.runtime.ray_session import ray_session

_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class FileSource:
    """One file to pack: its URL, the key it gets, and its class."""

    url: str
    key: str
    label: int


@dataclass
class PackReport:
    """What became of a folder.

    Attributes:
        manifest: the data set.
        damaged: "file: reason" of each file that could not be decoded.
        too_short: "file: reason" of each video with too few frames.
        changed: "file: what" of each video of variable rate, which was stored at a constant one.
        ignored: number of files that are something else by their name.
    """

    manifest: Manifest
    damaged: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    num_ignored: int = 0


class _EncodedFile(NamedTuple):
    """A file as it goes into a shard."""

    data: bytes
    suffix: str
    video: VideoInfo | None
    change: str


# From a file and its suffix; raises ValueError if it cannot be decoded.
_EncodeFn = Callable[[bytes, str], _EncodedFile]


@dataclass
class _ShardResult:
    """A shard, None if nothing went into it, and what became of its files."""

    num_files: int
    shard: Shard | None = None
    damaged: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def pack_images(
    source: str,
    destination: str,
    shard_mb: float = 100.0,
    max_side: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    address: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    split_list: str | None = None,
) -> PackReport:
    """Packs a folder of images, with class subfolders or without.

    The first folder level names the classes; without subfolders all images are of the class "all". Files that cannot be
    decoded are reported and listed in `damaged.txt` beside the shards; the rest is packed.

    Args:
        source, destination: folders, local or behind any fsspec URL.
        shard_mb: size of a shard, in millions of bytes.
        max_side: images with a longer side are shrunk to it (Lanczos); None keeps every image as it is.
        seed: of the shuffle over shards.
        workers: 0 packs in this process; otherwise through Ray, None with as many tasks as fit.
        address: the Ray cluster; None starts one on this machine.
        progress: called with the number of finished files and of all files.
        split_list: a list of the files to take, see `listing`.

    Raises:
        ValueError: the folder is missing, holds no images or none that can be decoded, the destination is in use, or
            storage fails.
    """
    _check_options(destination, shard_mb, max_side)
    plan = _make_plan(source, "images", IMAGE_SUFFIXES, split_list, shard_mb, seed)
    return _pack_plan(plan, destination, partial(_encode_image, max_side=max_side), num_workers, address, on_progress)


def pack_videos(
    source: str,
    destination: str,
    shard_mb: float = 100.0,
    max_side: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    address: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    split_list: str | None = None,
    min_frames: int = 16,
) -> PackReport:
    """Packs a folder of videos, as `pack_images` does images.

    Every video is decoded once: one that is damaged or too short is left out and listed in `damaged.txt` or
    `too-short.txt`. One of variable rate is stored at a constant rate and listed in `changed.txt`.

    Args:
        max_side: videos with a longer side are made again with that one; None keeps every video as it is.
        min_frames: videos with fewer frames are left out.
        source, destination, shard_mb, seed, workers, address, progress, split_list: as of `pack_images`.

    Raises:
        ValueError: the folder is missing, holds no videos or none that can be packed, or the destination is in use.
    """
    _check_options(destination, shard_mb, max_side)
    if min_frames < 1:
        raise ValueError(f"fewest frames {min_frames} must be 1 or more")
    plan = _make_plan(source, "videos", VIDEO_SUFFIXES, split_list, shard_mb, seed)
    encode = partial(_encode_video, max_side=max_side, min_frames=min_frames)
    return _pack_plan(plan, destination, encode, num_workers, address, on_progress)


def _encode_image(data: bytes, suffix: str, max_side: int | None) -> _EncodedFile:
    try:
        encoded, suffix = reencode_image(data, max_side)
    except DECODE_ERRORS as error:
        raise ValueError(decode_error_text(error)) from error
    return _EncodedFile(encoded, suffix, None, "")


def _encode_video(data: bytes, suffix: str, max_side: int | None, min_frames: int) -> _EncodedFile:
    return _EncodedFile(*transcode_if_needed(data, suffix, max_side, min_frames))


def _check_options(destination: str, shard_mb: float, max_side: int | None) -> None:
    if storage.exists(storage.join(destination, MANIFEST_FILE)):
        raise ValueError(f"{destination} already holds a packed data set; choose another folder or remove it first")
    if shard_mb <= 0:
        raise ValueError(f"shard size {shard_mb} MB must be positive")
    if max_side is not None and max_side < 8:
        raise ValueError(f"longest side {max_side} is too small; use at least 8 pixels")


@dataclass(frozen=True)
class _Plan:
    source: str
    kind: str
    shards: list[list[FileSource]]
    classes: tuple[str, ...]
    num_ignored: int


def _make_plan(
    source: str, kind: str, suffixes: tuple[str, ...], split_list: str | None, shard_mb: float, seed: int
) -> _Plan:
    """Deals the files of a folder out to shards."""
    file_list = list_files(source, kind, suffixes, split_list)
    shards: list[list[FileSource]] = [[]]
    filled_bytes = 0
    for number in np.random.default_rng(seed).permutation(len(file_list.urls)):
        url, size = file_list.urls[number], file_list.sizes[number]
        if shards[-1] and filled_bytes + size > shard_mb * 1e6:
            shards.append([])
            filled_bytes = 0
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", posixpath.splitext(posixpath.basename(url))[0])[:40]
        shards[-1].append(FileSource(url, f"{number:08d}_{slug}", file_list.labels[number]))
        filled_bytes += size
    return _Plan(source, kind, shards, file_list.classes, file_list.num_ignored)


def _pack_plan(
    plan: _Plan,
    destination: str,
    encode: _EncodeFn,
    num_workers: int | None,
    address: str | None,
    on_progress: Callable[[int, int], None],
) -> PackReport:
    total, done = sum(map(len, plan.shards)), 0
    results: list[_ShardResult] = []
    for part in _pack_shards(plan.shards, destination, encode, num_workers, address):
        results.append(part)
        done += part.num_files
        on_progress(done, total)
    shards = sorted((part.shard for part in results if part.shard is not None), key=lambda shard: shard.name)
    damaged, too_short, changed = (
        sorted(line for part in results for line in lines(part))
        for lines in (lambda p: p.damaged, lambda p: p.too_short, lambda p: p.changed)
    )
    if not shards:
        problem = "can be decoded" if damaged else "is long enough"
        raise ValueError(
            f"none of the {total} {plan.kind} in {plan.source} {problem}; the first: {(damaged + too_short)[0]}"
        )
    for name, lines in {"damaged": damaged, "too-short": too_short, "changed": changed}.items():
        if lines:
            storage.write_bytes(storage.join(destination, f"{name}.txt"), "\n".join(lines).encode() + b"\n")
    manifest = Manifest(destination, tuple(shards), plan.classes, plan.kind)
    write_manifest(manifest)
    return PackReport(manifest, damaged, too_short, changed, plan.num_ignored)


def _pack_shards(
    shards: list[list[FileSource]], destination: str, encode: _EncodeFn, num_workers: int | None, address: str | None
) -> Iterator[_ShardResult]:
    """Packs every shard of the plan, in this process or by Ray tasks, and yields each result as it is finished."""
    shard_arguments = [
        (f"shard-{number:06d}.tar", sources, destination, encode) for number, sources in enumerate(shards)
    ]
    if num_workers == 0:
        for arguments in shard_arguments:
            yield _pack_shard(*arguments)
        return
    with ray_session(address):
        import ray

        max_in_flight = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1)(_pack_shard)
        pending = list(reversed(shard_arguments))
        running = [task.remote(*pending.pop()) for _ in range(min(max_in_flight, len(shard_arguments)))]
        while running:
            [ready], running = ray.wait(running, num_returns=1)
            if pending:
                running.append(task.remote(*pending.pop()))
            yield ray.get(ready)


def _pack_shard(name: str, sources: list[FileSource], destination: str, encode: _EncodeFn) -> _ShardResult:
    """Writes one shard."""
    result = _ShardResult(len(sources))
    archive = io.BytesIO()
    samples: list[tuple[FileSource, int, _EncodedFile]] = []
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for source in sources:
            try:
                encoded = encode(storage.read_bytes(source.url), posixpath.splitext(source.url)[1][1:].lower())
            except TooShortError as error:
                result.too_short.append(f"{source.url}: {error}")
                continue
            except storage.StorageUnavailableError:
                # Nothing is wrong with the file, so a data set without it would not be whole.
                raise
            except ValueError as error:
                result.damaged.append(f"{source.url}: {error}")
                continue
            if encoded.change:
                result.changed.append(f"{source.url}: {encoded.change}")
            samples.append((source, archive.tell() + _TAR_BLOCK_BYTES, encoded))
            _add_member(tar, f"{source.key}.{encoded.suffix}", encoded.data)
            _add_member(tar, f"{source.key}.cls", str(source.label).encode())
    if samples:
        content = archive.getvalue()
        storage.write_bytes(storage.join(destination, name), content)
        result.shard = Shard(
            name,
            len(content),
            hashlib.sha256(content).hexdigest(),
            tuple(source.key for source, _, _ in samples),
            tuple(source.label for source, _, _ in samples),
            tuple(offset for _, offset, _ in samples),
            tuple(len(stored.data) for _, _, stored in samples),
            tuple(stored.video for _, _, stored in samples if stored.video is not None),
        )
    return result


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
