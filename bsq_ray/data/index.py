"""Write the manifest of WebDataset shards that another program made.

shards ─scan, one task each─▶ samples and labels ─number the classes─▶ index of each shard, one task each ─▶ manifest
                              └▶ counted and named: everything that is not used
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from bsq_ray import storage
from bsq_ray.data.file_ranges import read_range
from bsq_ray.data.folder_listing import FolderListing, FoundFile, format_counts, format_names, printable, walk_files
from bsq_ray.data.index_shard import IndexOptions
from bsq_ray.data.index_tasks import SCAN_FOLDER, LabelSummary, ScannedShard, finish_shard, scan_shard
from bsq_ray.data.manifest import Manifest, write_manifest
from bsq_ray.data.tar_members import compressed_format, is_tar_name
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress
from bsq_ray.runtime.ray_session import ray_session
from bsq_ray.runtime.task_map import task_map

# Threads that read the first bytes of the shards.
_MAX_HEAD_THREADS = 32


@dataclass
class IndexCounts:
    """Counts of what the shards of a folder contain.

    Attributes:
        num_members: number of files and links in the shards.
        num_used: number of members that are an image, a video or the label of one.
        unused: number of other members by reason; `num_members - num_used` in total.
        examples: a member for each reason.
        notes: what in the folder is not indexed, and first samples that cannot be decoded.
    """

    num_members: int = 0
    num_used: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, scanned: ScannedShard) -> None:
        """Add a shard; the order of the shards does not matter."""
        self.num_members += scanned.num_members
        self.num_used += scanned.num_used
        self.unused += scanned.unused
        for reason, example in scanned.examples.items():
            self.examples[reason] = min(self.examples.get(reason, example), example)
        self.notes += scanned.notes


@dataclass(kw_only=True)
class IndexReport(IndexCounts):
    """The result of indexing a folder of shards.

    Attributes:
        manifest: the data set.
        class_rule: text that explains how the classes are numbered; empty where a class is its label.
    """

    manifest: Manifest
    class_rule: str = ""

    def describe_unused(self) -> list[str]:
        """Return a line with count and example for each reason why members are not used."""
        ordered = sorted(self.unused.items(), key=lambda item: (-item[1], item[0]))
        return [f"{count} {reason}, such as {printable(self.examples[reason])}" for reason, count in ordered]


def index_shards(
    url: str, options: IndexOptions = IndexOptions(), on_progress: ProgressCallback = no_progress
) -> IndexReport:
    """Write the manifest of shards with `{key}.jpg|png|webp…` or `{key}.mp4|avi|…`, and a label for each.

    Labels are numbers or names in `{key}.cls`, or a field of `{key}.json`. Without labels all samples have one class.

    Args:
        url: folder of the shards.
        options: see `IndexOptions`.
        on_progress: called with the number of finished steps and of all steps, two per shard.

    Raises:
        ValueError: there are no tar files, a tar file is damaged, a shard has neither images nor videos that can be
            read, only some samples have a class, or a label is not one.
    """
    names, notes = _find_shards(url)
    counts, summary, rows = IndexCounts(), LabelSummary(), []
    # Tasks may run in another working folder.
    folder, items, num_workers = storage.absolute(url), [(name,) for name in names], options.num_workers
    session = nullcontext() if num_workers == 0 else ray_session(options.address)
    with session:
        try:
            for scanned in task_map(partial(scan_shard, folder, options), items, num_workers):
                counts.add(scanned)
                summary.add(scanned)
                on_progress(summary.num_shards, 2 * len(names))
            class_names, class_of, class_rule = summary.number_classes(url, options.class_list)
            for row in task_map(partial(finish_shard, folder, class_of), items, num_workers):
                rows.append(row)
                on_progress(len(names) + len(rows), 2 * len(names))
        finally:
            storage.remove_folder(storage.join(url, SCAN_FOLDER))
    rows.sort(key=lambda row: row.name)
    counts.notes = [*notes, *sorted(counts.notes)]
    manifest = write_manifest(url, rows, class_names, summary.kind(url), has_content_digests=False)
    return IndexReport(**vars(counts), manifest=manifest, class_rule=class_rule)


def _find_shards(url: str) -> tuple[list[str], list[str]]:
    """Return the names of the shards of a folder, and notes about files that look like shards and are none."""
    listing = FolderListing()
    tars = [file for file in walk_files(url, listing) if is_tar_name(file.name)] if storage.exists(url) else []
    shards: list[str] = []
    compressed: list[tuple[FoundFile, str]] = []
    nested = Counter(posixpath.dirname(file.name) for file in tars if "/" in file.name)
    candidates = [file for file in tars if "/" not in file.name]
    with ThreadPoolExecutor(_MAX_HEAD_THREADS, thread_name_prefix="read-heads") as pool:
        heads = list(pool.map(_read_head, candidates))
    for file, head in zip(candidates, heads, strict=True):
        compression = compressed_format(head, file.name)
        if compression is None:
            shards.append(file.name)
        elif file.name.lower().endswith(".tar"):
            raise ValueError(f"{file.path} is not a plain tar file: it is {compression}")
        else:
            compressed.append((file, compression))
    notes = listing.describe()
    if compressed:
        names = format_names([file.name for file, _ in compressed])
        notes.append(f"{len(compressed)} shards are compressed, so that no sample can be read alone: {names}; "
                     f"the first is {compressed[0][1]}")  # fmt: skip
    if nested:
        notes.append(
            f"{nested.total()} shards are in subfolders: {format_counts(nested)}; index each folder on its own"
        )
    if not shards:
        raise ValueError("; ".join([f"{url} contains no .tar shards to index", *notes]))
    return shards, notes


def _read_head(file: FoundFile) -> bytes:
    return read_range(file.path, 0, min(file.size, tarfile.BLOCKSIZE)) if file.size else b""
