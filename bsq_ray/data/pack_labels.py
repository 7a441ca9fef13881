"""Classes of images to pack: from a text file, or from labels, numbered as `data index` numbers them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence

import numpy as np

from bsq_ray.data.folder_listing import printable
from bsq_ray.data.sample_labels import SampleLabel, label_value, number_classes
from bsq_ray.data.text_lines import TextLine, read_lines

# Header of `LOC_val_solution.csv` of ImageNet, whose classes are followed by boxes.
_KAGGLE_HEADER = "ImageId,"


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
    white space, a comma or a semicolon, such as `LOC_val_solution.csv` of ImageNet.

    Raises:
        ValueError: the number of lines differs, a file has no line or two classes, or the classes are the numbers of
            the ILSVRC development kit, which differ from those of sorted synsets.
    """
    lines = [line for line in read_lines(label_file) if not line.is_comment]
    is_kaggle = bool(lines) and lines[0].text.startswith(_KAGGLE_HEADER)
    if not (lines := lines[is_kaggle:]):
        raise ValueError(f"{label_file} is empty")
    by_file = _read_pairs(label_file, lines, is_kaggle)
    found = [_find_label(name, by_file) for name in names]
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
    class_of = dict(
        zip(sorted(names), (SampleLabel(line.text, _where(label_file, line)) for line in lines), strict=True)
    )
    return [class_of[name] for name in names]


def _where(label_file: str, line: TextLine) -> str:
    return f"{label_file} line {line.number}"


def _read_pairs(label_file: str, lines: Iterable[TextLine], is_kaggle: bool) -> dict[str, SampleLabel]:
    """Return the label of each file that is named in the lines, by its path and by its path without a suffix."""
    by_file: dict[str, SampleLabel] = {}
    for line in lines:
        name, label_text = _split_pair(line.text)
        if not label_text:
            continue
        where = _where(label_file, line)
        label = SampleLabel(label_value(label_text.split()[0] if is_kaggle else label_text, where), where)
        path = posixpath.normpath(name.replace("\\", "/"))
        if by_file.setdefault(path, label).value != label.value:
            raise ValueError(f"{where} gives {printable(name)} another class than {by_file[path].member}")
        by_file.setdefault(posixpath.splitext(path)[0], label)
    return by_file


def _split_pair(text: str) -> tuple[str, str]:
    """Return the file name and the class of a line; the class is empty if there is one word."""
    # A comma, a semicolon or a tab separates names that contain spaces.
    separator = re.search(r"[,;\t]", text) or re.search(r"\s", text)
    if separator is None:
        return text, ""
    name, label = text[: separator.start()], text[separator.end() :]
    return name.strip().strip("\"'"), label.strip().strip("\"'")


def _find_label(name: str, by_file: dict[str, SampleLabel]) -> SampleLabel | None:
    """Return the label of a file by the longest end of its path that is listed, with or without its suffix."""
    parts = name.split("/")
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        label = by_file.get(end) or by_file.get(posixpath.splitext(end)[0])
        if label is not None:
            return label
    return None
