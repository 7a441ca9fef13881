"""Which files of a folder are packed, and the class of each: from its folder, or from a split list.

A split list is read as UCF-101's are: a line is `Class/file.avi` or `Class/file.avi 1`. Where `classInd.txt` lies
beside the list (`1 Class` a line), it numbers the classes; otherwise they are numbered in the order of their names.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from bsq_ray import storage

_CLASS_INDEX_FILE = "classInd.txt"


@dataclass(frozen=True)
class FileList:
    """The files to pack.

    Attributes:
        urls, labels, bytes: of each file.
        classes: names of the labels.
        ignored: number of files that are something else by their name.
    """

    urls: list[str]
    labels: list[int]
    sizes: list[int]
    classes: tuple[str, ...]
    num_ignored: int


def list_files(source: str, kind: str, suffixes: tuple[str, ...], split_list: str | None = None) -> FileList:
    """Lists a folder; its first level of folders names the classes, without one all files are of the class "all".

    Args:
        source: folder or fsspec URL.
        kind: "images" or "videos", for messages.
        suffixes: of the files that count.
        split_list: list of the files to take; None takes all. All folders count as classes, so that the lists of a
            training and a test split number them alike.

    Raises:
        ValueError: the folder is missing, holds nothing of the kind, mixes files with class folders, or the list names
            what is not there.
    """
    fs, root = storage.filesystem(source)
    with storage.translate_errors(source, "read"):
        if not fs.isdir(root):
            raise ValueError(f"{source} is not a folder" if fs.exists(root) else f"{source} does not exist")
        sizes = {path: info["size"] or 0 for path, info in sorted(fs.find(root, detail=True).items())}
    paths = {posixpath.relpath(path, root): path for path in sizes if path.lower().endswith(suffixes)}
    if not paths:
        raise ValueError(f"{source} holds no {kind} (looked for {', '.join(suffixes)})")
    folders = {name: name.split("/")[0] if "/" in name else "" for name in paths}
    class_names = set(folders.values()) - {""}
    if "" in folders.values() and class_names:
        stray = next(name for name, folder in folders.items() if not folder)
        raise ValueError(
            f"{source} holds {kind} both in class folders ({min(class_names)}, …) and outside of them ({stray}, …); "
            "move them into class folders"
        )
    classes = tuple(sorted(class_names)) or ("all",)
    names = list(paths)
    if split_list is not None:
        if class_names:
            # UCF-101 numbers its classes without regard to case.
            classes = _read_class_order(split_list, class_names) or tuple(sorted(class_names, key=str.casefold))
        names = _read_split(split_list, source, paths, classes)
    local = storage.is_local(source)
    return FileList(
        [paths[name] if local else fs.unstrip_protocol(paths[name]) for name in names],
        [classes.index(folders[name] or "all") for name in names],
        [sizes[paths[name]] for name in names],
        classes,
        len(sizes) - len(paths),
    )


def _read_split(url: str, source: str, paths: dict[str, str], classes: tuple[str, ...]) -> list[str]:
    names: dict[str, None] = {}
    for number, line in enumerate(storage.read_bytes(url).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().partition(" ")
        if name not in paths:
            raise ValueError(f"{url} line {number}: there is no {name} in {source}")
        expected_number = classes.index(name.split("/")[0]) + 1 if "/" in name else 1
        if label and label.strip() != str(expected_number):
            raise ValueError(
                f"{url} line {number}: {name} has the class number {label.strip()}, but its class is number {expected_number} of "
                f"{len(classes)}; put the {_CLASS_INDEX_FILE} that belongs to the list beside it"
            )
        names[name] = None
    if not names:
        raise ValueError(f"{url} lists no files")
    return list(names)


def _read_class_order(split_list: str, class_names: set[str]) -> tuple[str, ...]:
    """Class names in the order of the numbers beside the list; empty if there are none."""
    url = storage.join(posixpath.dirname(split_list) or ".", _CLASS_INDEX_FILE)
    if not storage.exists(url):
        return ()
    rows = [line.split() for line in storage.read_bytes(url).decode("utf-8", "replace").splitlines() if line.strip()]
    if [row[0] for row in rows] != [str(n) for n in range(1, len(rows) + 1)] or any(len(row) != 2 for row in rows):
        raise ValueError(f"{url} must number the classes from 1, one `1 Class` a line")
    classes = tuple(row[1] for row in rows)
    if missing := class_names - set(classes):
        raise ValueError(f"{url} does not number the class {min(missing)}")
    return classes
