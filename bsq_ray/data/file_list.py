"""List the files of a folder to pack, and their classes: from its subfolders, or from a split list.

A split list has the format of UCF-101: each line is `Class/file.avi` or `Class/file.avi 1`. A `classInd.txt` next to
the list (`1 Class` per line) numbers the classes. Without it they are numbered in the order of their names.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bsq_ray.data.folder_listing import (
    FolderListing,
    FoundFile,
    count_suffixes,
    describe_other_files,
    printable,
    walk_files,
)
from bsq_ray.data.split_list import read_class_order, read_split_list

# Names that are collected before they move into a column.
_CHUNK_FILES = 100_000


@dataclass(frozen=True)
class IgnoredFiles:
    """Entries of a folder that are not packed.

    Attributes:
        kind: "images" or "videos".
        other_suffixes: number of files of other types, by suffix.
        listing: leftovers of systems and tools, broken links, loops.
        reasons: number of entries that are ignored for other reasons.
        examples: an entry for each of these reasons.
    """

    kind: str
    other_suffixes: Counter[str] = field(default_factory=Counter)
    listing: FolderListing = field(default_factory=FolderListing)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        """Count an entry that is ignored for a reason."""
        self.reasons[reason] += 1
        self.examples.setdefault(reason, name)

    def add(self, other: IgnoredFiles) -> None:
        """Add the other suffixes and reasons of another part of the source."""
        self.other_suffixes.update(other.other_suffixes)
        self.reasons.update(other.reasons)
        for reason, name in other.examples.items():
            self.examples.setdefault(reason, name)

    def describe(self) -> list[str]:
        """Return a line for each kind of ignored entry, with counts and examples."""
        lines = [describe_other_files(self.other_suffixes, self.kind)] if self.other_suffixes else []
        lines += [
            f"{count} {reason}, such as {printable(self.examples[reason])}" for reason, count in self.reasons.items()
        ]
        return lines + self.listing.describe()


@dataclass(frozen=True)
class FileList:
    """The files to pack, as columns: about 20 bytes a file beyond its name.

    Attributes:
        prefix: what comes before the name of a file in its URL.
        names: paths relative to the folder, as bytes, because they need not be UTF-8.
        labels_F, sizes_F: class, and size in bytes of each file.
        classes: names of the labels.
        ignored: everything else in the folder.
    """

    prefix: str
    names: pa.Array
    labels_F: np.ndarray
    sizes_F: np.ndarray
    classes: tuple[str, ...]
    ignored: IgnoredFiles

    @property
    def urls(self) -> list[str]:
        """URL of each file."""
        return [self.prefix + decode_name(name) for name in self.names.to_pylist()]

    @property
    def labels(self) -> list[int]:
        """Class of each file."""
        return [int(label) for label in self.labels_F]


def encode_name(name: str) -> bytes:
    """Return a file name as bytes; names of local files may contain bytes that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """Return the file name of `encode_name`."""
    return name.decode("utf-8", "surrogateescape")


def list_files(source: str, kind: str, suffixes: tuple[str, ...], split_list: str | None = None) -> FileList:
    """List a folder; its first level of subfolders names the classes, without it all files have the class "all".

    Args:
        source: folder or fsspec URL.
        kind: "images" or "videos", for messages.
        suffixes: lowercase suffixes of the files to list.
        split_list: list of the files to use; None uses all. All subfolders count as classes, so that a training and
            a test split have the same class numbers.

    Raises:
        ValueError: the folder is missing, has no such files, mixes files with class folders, or the split list names
            missing files.
    """
    columns = _FileColumns()
    listing, other_suffixes = FolderListing(), Counter[str]()
    for file in walk_files(source, listing):
        if file.name.lower().endswith(suffixes):
            columns.add(file)
        else:
            other_suffixes.update(count_suffixes([file.name]))
    ignored = IgnoredFiles(kind, other_suffixes, listing)
    if not columns.sizes:
        reasons = "".join(f"; it has {line}" for line in ignored.describe())
        raise ValueError(f"{source} contains no {kind} (looked for {', '.join(suffixes)}){reasons}")
    class_names = set(columns.folder_numbers) - {""}
    if columns.file_outside_folders and class_names:
        raise ValueError(
            f"{source} has {kind} both in class folders ({printable(min(class_names))}, …) and outside of them "
            f"({printable(columns.file_outside_folders)}, …); move them into class folders"
        )
    classes = tuple(sorted(class_names)) or ("all",)
    names, folders_F, sizes_F = columns.sorted_by_name()
    if split_list is not None:
        if class_names:
            # UCF-101 sorts its classes case-insensitively.
            classes = read_class_order(split_list, class_names) or tuple(sorted(class_names, key=str.casefold))
        all_names = {decode_name(name): index for index, name in enumerate(names.to_pylist())}
        rows = [all_names[name] for name in read_split_list(split_list, source, all_names, classes)]
        names, folders_F, sizes_F = names.take(pa.array(rows)), folders_F[rows], sizes_F[rows]
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([label_of[folder or "all"] for folder in columns.folder_numbers], np.int32)
    return FileList(columns.prefix, names, labels[folders_F], sizes_F, classes, ignored)


class _FileColumns:
    """Columns that grow by one file at a time."""

    def __init__(self) -> None:
        self.prefix, self.file_outside_folders = "", ""
        # Number of each class folder; "" for files outside of them.
        self.folder_numbers: dict[str, int] = {}
        self.sizes = array("q")
        self._folders = array("i")
        self._names: list[bytes] = []
        self._chunks: list[pa.Array] = []

    def add(self, file: FoundFile) -> None:
        self.prefix = self.prefix or file.path.removesuffix(file.name)
        folder = file.name.split("/")[0] if "/" in file.name else ""
        if not folder:
            self.file_outside_folders = min(self.file_outside_folders or file.name, file.name)
        self._folders.append(self.folder_numbers.setdefault(folder, len(self.folder_numbers)))
        self.sizes.append(file.size)
        self._names.append(encode_name(file.name))
        if len(self._names) == _CHUNK_FILES:
            self._flush()

    def _flush(self) -> None:
        self._chunks.append(pa.array(self._names, pa.large_binary()))
        self._names = []

    def sorted_by_name(self) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        """Return names, numbers of the class folders and sizes, in the order of the names."""
        self._flush()
        names = pa.concat_arrays(self._chunks)
        order_F = pc.sort_indices(names).to_numpy()
        return names.take(pa.array(order_F)), np.array(self._folders)[order_F], np.array(self.sizes)[order_F]


def find_files(source: str, kind: str, suffixes: tuple[str, ...]) -> tuple[list[FoundFile], IgnoredFiles]:
    """Return the files of a folder with one of the suffixes, sorted by name, and what else it contains.

    Raises:
        ValueError: the folder is missing or cannot be read.
    """
    listing = FolderListing()
    files, other_names = [], []
    for file in walk_files(source, listing):
        if file.name.lower().endswith(suffixes):
            files.append(file)
        else:
            other_names.append(file.name)
    files.sort(key=lambda file: file.name)
    return files, IgnoredFiles(kind, count_suffixes(other_names), listing)
