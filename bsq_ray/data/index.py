"""Write the manifest of WebDataset shards that another program made.

shards ─members─▶ samples and labels ─number the classes─▶ manifest ─read a sample of each shard back─▶ written
                  └▶ counted and named: everything that is not used
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

from bsq_ray import storage
from bsq_ray.data.folder_listing import FolderListing, FoundFile, format_counts, format_names, printable, walk_files
from bsq_ray.data.index_shard import IndexedShard, IndexOptions, index_shard
from bsq_ray.data.manifest import Manifest, write_manifest
from bsq_ray.data.sample_labels import (
    number_classes,
)
from bsq_ray.data.shard_index import Shard, shard_row, with_labels, write_index
from bsq_ray.data.shard_reader import decode_blob, fetch_located
from bsq_ray.data.tar_members import compressed_format, is_tar_name
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress


@dataclass
class IndexReport:
    """The result of indexing a folder of shards.

    Attributes:
        manifest: the data set.
        num_members: number of files and links in the shards.
        num_used: number of members that are an image, a video or the label of one.
        unused: number of other members by the reason; `num_members - num_used` in all.
        examples: a member for each reason.
        class_rule: text that explains how the classes are numbered; empty where a class is its label.
        notes: what in the folder is not indexed, and first samples that cannot be decoded.
    """

    manifest: Manifest
    num_members: int = 0
    num_used: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    class_rule: str = ""
    notes: list[str] = field(default_factory=list)

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
        on_progress: called with the number of finished shards and of all shards.

    Raises:
        ValueError: there are no tar files, a tar file or video is damaged, a shard has neither images nor videos, only
            some samples have a class, or a label is not one.
    """
    names, notes = _find_shards(url)
    contents = []
    for number, name in enumerate(names, 1):
        content = storage.read_bytes(storage.join(url, name))
        contents.append(index_shard(name, content, storage.join(url, name), options))
        on_progress(number, len(names))
    classes_by_shard, class_names, class_rule = _number_shard_classes(url, contents, options)
    kinds = {"videos" if shard.shard.videos else "images": shard.shard.name for shard in contents}
    if len(kinds) > 1:
        raise ValueError(
            f"{url} contains images ({kinds['images']}) and videos ({kinds['videos']}); put them in separate folders"
        )
    shards = [with_labels(each.shard, labels) for each, labels in zip(contents, classes_by_shard, strict=True)]
    kind = next(iter(kinds))
    notes += [] if kind == "videos" else [note for shard in shards for note in _read_back(url, shard)]
    rows = [shard_row(shard, write_index(url, shard)) for shard in shards]
    manifest = write_manifest(url, rows, class_names, kind, has_content_digests=True)
    report = IndexReport(manifest, class_rule=class_rule, notes=notes)
    for indexed in contents:
        report.num_members += indexed.num_members
        report.num_used += indexed.num_used
        report.unused += indexed.unused
        report.examples = indexed.examples | report.examples
    return report


def _find_shards(url: str) -> tuple[list[str], list[str]]:
    """Return the names of the shards of a folder, and notes about files that look like shards and are none."""
    listing = FolderListing()
    tars = [file for file in walk_files(url, listing) if is_tar_name(file.name)] if storage.exists(url) else []
    shards: list[str] = []
    compressed: list[tuple[FoundFile, str]] = []
    nested = Counter(posixpath.dirname(file.name) for file in tars if "/" in file.name)
    for file in tars:
        if "/" in file.name:
            continue
        compression = compressed_format(_read_head(file), file.name)
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
    with storage.open_url(file.path) as stream:
        return bytes(stream.read(tarfile.BLOCKSIZE))


def _number_shard_classes(
    url: str, shards: list[IndexedShard], options: IndexOptions
) -> tuple[list[tuple[int, ...]], tuple[str, ...], str]:
    """Return the classes of the samples of each shard, the names of the classes, and the rule of their numbers."""
    labels = [label for shard in shards for label in shard.labels if label is not None]
    num_samples = sum(len(shard.labels) for shard in shards)
    if not labels:
        return [(0,) * len(shard.labels) for shard in shards], ("0",), ""
    if len(labels) < num_samples:
        unlabeled = next(
            f"{shard.shard.name}: {key}"
            for shard in shards
            for key, label in zip(shard.shard.keys, shard.labels, strict=True)
            if label is None
        )
        raise ValueError(
            f"{num_samples - len(labels)} of {num_samples} samples in {url} have no class, such as {unlabeled}; "
            "give each a .cls, or none of them"
        )
    json_fields = {name: member for shard in reversed(shards) for name, member in shard.json_fields.items()}
    if len(json_fields) > 1:
        fields = ", ".join(f"{name} ({member})" for name, member in sorted(json_fields.items()))
        raise ValueError(f"the labels in {url} are in several fields: {fields}; choose one with --label-field")
    classes = number_classes(labels, options.class_list)
    indices = iter(classes.indices)
    return [tuple(islice(indices, len(shard.labels))) for shard in shards], classes.names, classes.rule


def _read_back(url: str, shard: Shard) -> list[str]:
    """Read the first image of a shard as training does, or the next one that can be decoded.

    Returns:
        A note for each image before it.

    Raises:
        ValueError: no image of the shard can be read.
    """
    notes: list[str] = []
    for index in range(shard.num_samples):
        entry = shard.entry(index)
        [blob] = fetch_located(url, [(shard, index)])
        try:
            decode_blob(blob, entry.size, None)
            return notes
        except ValueError as error:
            notes.append(f"{shard.name}: {entry.key}: {error}")
    raise ValueError(f"no image of {storage.join(url, shard.name)} can be read; first: {notes[0]}")
