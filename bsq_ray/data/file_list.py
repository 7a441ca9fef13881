"""List the files of a folder to pack, and their classes: from its subfolders, or from a split list.

A split list has the format of UCF-101: each line is `Class/file.avi` or `Class/file.avi 1`. A `classInd.txt` next to
the list (`1 Class` per line) numbers the classes. Without it they are numbered in the order of their names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from bsq_ray.data.folder_listing import (
    FolderListing,
    FoundFile,
    count_suffixes,
    describe_other_files,
    printable,
    walk_files,
)
from bsq_ray.data.split_list import read_class_order, read_split_list


@dataclass(frozen=True)
class IgnoredFiles:
    """Entries of a folder that are not packed.

    Attributes:
        kind: "images" or "videos".
        other_suffixes: number of files of other types, by suffix.
        listing: leftovers of systems and tools, broken links, loops.
    """

    kind: str
    other_suffixes: Counter[str] = field(default_factory=Counter)
    listing: FolderListing = field(default_factory=FolderListing)

    def describe(self) -> list[str]:
        """Return a line for each kind of ignored entry, with counts and examples."""
        lines = [describe_other_files(self.other_suffixes, self.kind)] if self.other_suffixes else []
        return lines + self.listing.describe()


@dataclass(frozen=True)
class FileList:
    """The files to pack.

    Attributes:
        urls, labels, sizes: URL, class and size in bytes of each file.
        classes: names of the labels.
        ignored: everything else in the folder.
    """

    urls: list[str]
    labels: list[int]
    sizes: list[int]
    classes: tuple[str, ...]
    ignored: IgnoredFiles


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
    files, ignored = find_files(source, kind, suffixes)
    if not files:
        reasons = "".join(f"; it has {line}" for line in ignored.describe())
        raise ValueError(f"{source} contains no {kind} (looked for {', '.join(suffixes)}){reasons}")
    by_name = {file.name: file for file in files}
    folders = {name: name.split("/")[0] if "/" in name else "" for name in by_name}
    class_names = set(folders.values()) - {""}
    if "" in folders.values() and class_names:
        stray = next(name for name, folder in folders.items() if not folder)
        raise ValueError(
            f"{source} has {kind} both in class folders ({printable(min(class_names))}, …) and outside of them "
            f"({printable(stray)}, …); move them into class folders"
        )
    classes = tuple(sorted(class_names)) or ("all",)
    names = list(by_name)
    if split_list is not None:
        if class_names:
            # UCF-101 sorts its classes case-insensitively.
            classes = read_class_order(split_list, class_names) or tuple(sorted(class_names, key=str.casefold))
        names = read_split_list(split_list, source, by_name, classes)
    label_of = {name: label for label, name in enumerate(classes)}
    return FileList(
        [by_name[name].path for name in names],
        [label_of[folders[name] or "all"] for name in names],
        [by_name[name].size for name in names],
        classes,
        ignored,
    )


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
