"""Classes of images to pack: from a text file, or from labels, numbered as `data index` numbers them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from bsq_ray.data.folder_listing import printable
from bsq_ray.data.sample_labels import Label, SampleLabel, label_value, number_classes
from bsq_ray.data.text_lines import TextLine, read_lines
from bsq_ray.media.images import IMAGE_SUFFIXES

# Header of `LOC_val_solution.csv` of ImageNet, whose classes are followed by boxes.
_KAGGLE_HEADER = re.compile(r"[\"']?ImageId[\"']?,")
_SYNSET = re.compile(r"n[0-9]{8}")
_QUOTED_PAIR = re.compile(r"([\"'])(.+?)\1(?:\s*[,;]\s*|\s+)(.*)")


def number_labels(labels: Sequence[SampleLabel]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class of each label, int32, and the names of the classes.

    Raises:
        ValueError: the labels are partly numbers and partly names.
    """
    first = {label.value: label for label in reversed(labels)}
    classes = number_classes(list(first.values()), None)
    class_of = dict(zip(first, classes.indices, strict=True))
    return np.array([class_of[label.value] for label in labels], np.int32), classes.names


def number_texts(texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class of each text, int32, and the names of the classes: numbers if all texts are, otherwise names."""
    names = sorted(set(texts))
    are_numbers = all(re.fullmatch(r"0|[1-9][0-9]*", name) for name in names)
    classes = number_classes([SampleLabel(int(name) if are_numbers else name, name) for name in names], None)
    class_of = dict(zip(names, classes.indices, strict=True))
    return np.array([class_of[text] for text in texts], np.int32), classes.names


def number_folders(folders: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class of each file by the name of its folder; without folders all files have the class "all".

    Raises:
        ValueError: only some files are in a folder.
    """
    num_outside = folders.count("")
    if num_outside == len(folders):
        return np.zeros(len(folders), np.int32), ("all",)
    if num_outside:
        raise ValueError(f"{num_outside} of {len(folders)} files are outside of the folders that are the classes")
    return number_texts(folders)


def label_names(label_file: str, names: Sequence[str]) -> list[SampleLabel]:
    """Return the class of each file from a text file.

    The text has a class per line, in the sorted order of the files; or a file name and its class per line, separated by
    white space, a comma or a semicolon, such as `LOC_val_solution.csv` of ImageNet. A listed path may have more or
    fewer folders than that of the file.

    Raises:
        ValueError: the number of lines differs, they name other files, a file has no line or two classes, or the
            classes are the numbers of the ILSVRC development kit, which differ from those of sorted synsets.
    """
    lines = [line for line in read_lines(label_file) if not line.is_comment]
    is_kaggle = bool(lines) and _KAGGLE_HEADER.match(lines[0].text) is not None
    if not (lines := lines[is_kaggle:]):
        raise ValueError(f"{label_file} is empty")
    listed = list(_read_pairs(label_file, lines, names, is_kaggle))
    found = _find_labels(label_file, names, listed)
    if any(found):
        if unknown := [name for name, label in zip(names, found, strict=True) if label is None]:
            raise ValueError(
                f"{label_file} has no class for {len(unknown)} of {len(names)} files, such as {printable(unknown[0])}"
            )
        return [label for label in found if label is not None]
    if all(line.text.isdecimal() for line in lines):
        raise ValueError(
            f"{label_file} has numbers ({lines[0].text}, …), which do not name the classes of the training set; "
            "use a list with a synset (such as n01440764) per line"
        )
    if len(lines) != len(names):
        raise ValueError(f"{label_file} has {len(lines)} lines for {len(names)} files, and names none of them")
    if _has_file_names(listed, lines):
        raise ValueError(
            f"{label_file} names none of the files: it starts with {printable(lines[0].text)}, but there are files "
            f"such as {printable(names[0])}"
        )
    distinct: dict[str, SampleLabel] = {}
    class_of = dict(zip(sorted(names), (_shared(distinct, line.text, label_file, line) for line in lines), strict=True))
    return [class_of[name] for name in names]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A path of the text file, its label, and its line."""

    path: str
    label: SampleLabel
    line: int


@dataclass
class _ListedPaths:
    """Lines by a path, and by the path without its suffix; a pair of lines for a path with two classes."""

    label_file: str
    exact: dict[str, _Listed | tuple[_Listed, _Listed]] = field(default_factory=dict)
    stems: dict[str, _Listed | tuple[_Listed, _Listed]] = field(default_factory=dict)

    def add(self, path: str, listed: _Listed) -> None:
        """Add a line for a path."""
        stem = posixpath.splitext(path)[0]
        for by_path, key in ((self.exact, path), *([(self.stems, stem)] if stem != path else [])):
            first = by_path.setdefault(key, listed)
            if isinstance(first, _Listed) and first.label.value != listed.label.value:
                by_path[key] = first, listed

    def find(self, path: str) -> _Listed | None:
        """Return the line for a path, with or without its suffix.

        Raises:
            ValueError: two lines give it different classes.
        """
        stem = posixpath.splitext(path)[0]
        found = self.exact.get(path) or self.exact.get(stem) or self.stems.get(stem) or self.stems.get(path)
        if isinstance(found, tuple):
            first, second = found
            raise ValueError(
                f"{self.label_file} line {second.line} gives {printable(path)} another class than "
                f"{self.label_file} line {first.line}"
            )
        return found


def _find_labels(label_file: str, names: Sequence[str], listed: list[_Listed]) -> list[SampleLabel | None]:
    """Return the label of each file: by the longest end of its path that is listed, or the longest common end."""
    whole_paths = _ListedPaths(label_file)
    for each in listed:
        whole_paths.add(each.path, each)
    found: list[SampleLabel | None] = []
    file_of: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        line = next((line for end in ends if (line := whole_paths.find(end))), None)
        found.append(line.label if line else None)
        if line:
            file_of[line.path] = name
    max_depth = max((each.path.count("/") for each in listed), default=0)
    for depth in range(max_depth, 0, -1):
        rows = [row for row, label in enumerate(found) if label is None]
        if not rows:
            break
        ends_of_paths = _ListedPaths(label_file)
        for each in listed:
            if each.path.count("/") >= depth:
                ends_of_paths.add(_last_parts(each.path, depth), each)
        for row in rows:
            line = ends_of_paths.find(_last_parts(names[row], depth)) if names[row].count("/") >= depth - 1 else None
            # A line whose folders differ from those of the file is that of one file.
            if line and file_of.setdefault(line.path, names[row]) == names[row]:
                found[row] = line.label
    return found


def _last_parts(path: str, num_parts: int) -> str:
    return "/".join(path.rsplit("/", num_parts)[-num_parts:])


def _has_file_names(listed: list[_Listed], lines: list[TextLine]) -> bool:
    """Return True if the lines name files rather than classes that consist of several words."""
    paths = [each.path for each in listed]
    if any("/" in path or path.lower().endswith(IMAGE_SUFFIXES) for path in paths):
        return True
    if any(line.text.lower().endswith(IMAGE_SUFFIXES) for line in lines):
        return True
    # Each image would have a class of its own otherwise.
    if len(set(paths)) < len(lines):
        return False
    are_ids = all(isinstance(each.label.value, int) or _SYNSET.fullmatch(each.label.value) for each in listed)
    are_numbered = all(re.search(r"[0-9]", path) and not _SYNSET.fullmatch(path) for path in paths)
    return are_ids or are_numbered


def _shared(distinct: dict[Any, SampleLabel], value: Label, label_file: str, line: TextLine) -> SampleLabel:
    """Return one object for each label: data sets have many files and few classes."""
    label = distinct.get(value)
    return label or distinct.setdefault(value, SampleLabel(value, f"{label_file} line {line.number}"))


def _read_pairs(label_file: str, lines: Iterable[TextLine], names: Sequence[str], is_kaggle: bool) -> Iterator[_Listed]:
    """Yield the lines that have a path and a label."""
    distinct: dict[Any, SampleLabel] = {}
    known = _KnownNames(names)
    for line in lines:
        name, text = _split_pair(line.text, known, is_kaggle)
        if text:
            value = label_value(text, f"{label_file} line {line.number}")
            path = posixpath.normpath(name.replace("\\", "/"))
            yield _Listed(path, _shared(distinct, value, label_file, line), line.number)


class _KnownNames:
    """Base names of the files, with and without their suffixes; collected when a line needs them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __contains__(self, path: str) -> bool:
        return posixpath.basename(path.strip().strip("\"'").replace("\\", "/")) in self._base_names

    @cached_property
    def _base_names(self) -> set[str]:
        base_names = {posixpath.basename(name) for name in self._names}
        return base_names | {posixpath.splitext(name)[0] for name in base_names}


def _split_pair(text: str, known: _KnownNames, is_kaggle: bool) -> tuple[str, str]:
    """Return the file name and the class of a line; the class is empty if there is one word."""
    if quoted := _QUOTED_PAIR.fullmatch(text):
        name, rest = quoted[2], quoted[3]
    else:
        separators = list(re.finditer(r"\s*[,;\t]\s*|\s+", text))
        if not separators:
            return text, ""
        separator = separators[0]
        # Names may contain spaces and commas.
        if len(separators) > 1 and not is_kaggle and not text[: separator.start()].lower().endswith(IMAGE_SUFFIXES):
            has_suffix = (match for match in separators if text[: match.start()].lower().endswith(IMAGE_SUFFIXES))
            is_file = (match for match in reversed(separators) if text[: match.start()] in known)
            separator = next(chain(has_suffix, is_file), separator)
        name, rest = text[: separator.start()], text[separator.end() :]
    # A synset may be followed by its words or by boxes, a class by the columns of a table.
    first_word = rest.strip().strip("\"'").partition(" ")[0]
    label = first_word if is_kaggle or _SYNSET.fullmatch(first_word) else rest.partition("\t")[0]
    return name.strip().strip("\"'"), label.strip().strip("\"'")
