"""The two passes of the index over each shard, as tasks, and the classes of all shards between them.

    shards ─scan: members, labels, a sample read back─▶ index with the shard's own labels, in a temporary folder
           ─all labels─▶ classes ─finish: number the labels─▶ shard-000000.arrow

The driver holds the distinct labels of the data set, not those of its samples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from bsq_ray import storage
from bsq_ray.data.index_shard import IndexedShard, IndexOptions, index_shard
from bsq_ray.data.sample_index import (
    Shard,
    ShardRow,
    index_digest,
    read_index,
    shard_row,
    with_digest,
    with_labels,
    write_index,
)
from bsq_ray.data.sample_labels import Label, SampleLabel, number_classes
from bsq_ray.data.shard_content import open_content
from bsq_ray.data.shard_reader import decode_blob, fetch_located

# Listings of folders skip it, should a run be killed.
SCAN_FOLDER = "index.partial"
_UNLABELED = -1


@dataclass
class ScannedShard:
    """The result of the first pass.

    Attributes:
        name, kind: of the shard; "images" or "videos".
        num_samples: number of samples.
        labels: distinct labels, each with a member that has it.
        unlabeled: number of samples without a label.
        first_unlabeled: "shard: key" of the first; empty for none.
        json_fields, num_members, num_used, unused, examples: as in `IndexedShard`.
        notes: first images that cannot be decoded.
        retries: messages of storage errors before a retry succeeded.
    """

    name: str
    kind: str
    num_samples: int
    labels: list[SampleLabel]
    unlabeled: int
    first_unlabeled: str
    json_fields: dict[str, str]
    num_members: int
    num_used: int
    unused: Counter[str]
    examples: dict[str, str]
    notes: list[str] = field(default_factory=list)


def scan_shard(url: str, options: IndexOptions, name: str) -> ScannedShard:
    """Read the members and labels of a shard, and write its index with the numbers of its own labels.

    Raises:
        ValueError: see `index_shard`; or no image of the shard can be read.
    """

    def read() -> IndexedShard:
        with open_content(storage.join(url, name)) as content:
            return index_shard(name, content, storage.join(url, name), options)

    indexed = storage.retry_while_unavailable(read, options.storage_timeout_s, lambda _: None)
    # The first member with a label stands for it in messages.
    distinct = {label.value: label for label in reversed(indexed.labels) if label is not None}
    labels = list(reversed(distinct.values()))
    number_of = {label.value: number for number, label in enumerate(labels)}
    numbers = [_UNLABELED if label is None else number_of[label.value] for label in indexed.labels]
    shard = with_labels(indexed.shard, numbers)
    write_index(storage.join(url, SCAN_FOLDER), shard, {"labels": [label.value for label in labels]})
    is_video = "video" in shard.rows.schema.names
    unlabeled = [index for index, number in enumerate(numbers) if number == _UNLABELED]
    return ScannedShard(
        name,
        "videos" if is_video else "images",
        shard.num_samples,
        labels,
        len(unlabeled),
        f"{name}: {shard.key(unlabeled[0])}" if unlabeled else "",
        indexed.json_fields,
        indexed.num_members,
        indexed.num_used,
        indexed.unused,
        indexed.examples,
        # The index has read each video.
        [] if is_video else _read_back(url, shard),
    )


def finish_shard(url: str, class_of: dict[Label, int], name: str) -> ShardRow:
    """Write the index of a scanned shard with the classes of the data set; return its row of the manifest.

    Args:
        url: folder of the shards.
        class_of: class of each label; empty for a data set without labels.
        name: of the shard.
    """
    scanned = read_index(storage.join(url, SCAN_FOLDER), name)
    if scanned is None:
        raise ValueError(f"the scan of {storage.join(url, name)} was removed; index one folder at a time")
    shard, facts, _ = scanned
    classes = np.array([class_of[label] for label in facts["labels"]] or [0], np.int64)
    numbers_P = shard.rows.column("label").to_numpy()
    shard = with_labels(shard, classes[np.maximum(numbers_P, 0)])
    shard = with_digest(shard, index_digest(shard.rows))
    return shard_row(shard, write_index(url, shard))


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


@dataclass
class LabelSummary:
    """The distinct labels of all scanned shards, and what is needed to check that they belong together."""

    num_shards: int = 0
    _num_samples: int = 0
    _num_unlabeled: int = 0
    _first_unlabeled: str = ""
    _labels: dict[Label, SampleLabel] = field(default_factory=dict)
    _json_fields: dict[str, str] = field(default_factory=dict)
    _kinds: dict[str, str] = field(default_factory=dict)

    def add(self, scanned: ScannedShard) -> None:
        """Add a shard; the order of the shards does not matter."""
        self.num_shards += 1
        self._num_samples += scanned.num_samples
        self._num_unlabeled += scanned.unlabeled
        if scanned.first_unlabeled:
            self._first_unlabeled = min(self._first_unlabeled or scanned.first_unlabeled, scanned.first_unlabeled)
        for label in scanned.labels:
            known = self._labels.get(label.value)
            if known is None or label.member < known.member:
                self._labels[label.value] = label
        self._json_fields = scanned.json_fields | self._json_fields
        self._kinds[scanned.kind] = min(self._kinds.get(scanned.kind, scanned.name), scanned.name)

    def kind(self, url: str) -> str:
        """Return "images" or "videos".

        Raises:
            ValueError: there are both.
        """
        if len(self._kinds) > 1:
            raise ValueError(
                f"{url} contains images ({self._kinds['images']}) and videos ({self._kinds['videos']}); "
                "put them in separate folders"
            )
        return next(iter(self._kinds))

    def number_classes(self, url: str, class_list: str | None) -> tuple[tuple[str, ...], dict[Label, int], str]:
        """Return the names of the classes, the class of each label, and the rule of their numbers.

        Raises:
            ValueError: only some samples have a label, or the labels do not belong together.
        """
        self.kind(url)
        if not self._labels:
            return ("0",), {}, ""
        if self._num_unlabeled:
            raise ValueError(
                f"{self._num_unlabeled} of {self._num_samples} samples in {url} have no class, such as "
                f"{self._first_unlabeled}; give each a .cls, or none of them"
            )
        if len(self._json_fields) > 1:
            fields = ", ".join(f"{name} ({member})" for name, member in sorted(self._json_fields.items()))
            raise ValueError(f"the labels in {url} are in several fields: {fields}; choose one with --label-field")
        labels = sorted(self._labels.values(), key=lambda label: label.member)
        classes = number_classes(labels, class_list)
        return classes.names, dict(zip((label.value for label in labels), classes.indices, strict=True)), classes.rule
