"""Read split lists and class lists, as people hand them on: of UCF-101 and of other data sets.

    trainlist01.txt   `Class/file.avi 1`, `Class/file.avi`, `UCF-101\\Class\\file.avi`, `./Class/file.avi, 1`, …
    classInd.txt      `1 Class`

The files of the folder decide which part of a line is the name, and which part is a class number.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from bsq_ray import storage
from bsq_ray.data.folder_listing import printable
from bsq_ray.data.text_lines import read_lines

_CLASS_INDEX_FILE = "classInd.txt"
# A class number or a comment at the end of a line, after white space, a comma or a semicolon.
_LINE_END = re.compile(r"^(?P<name>.*?\S)\s*[\s,;]\s*(?P<end>[^\s,;]+|#.*)$")


def read_split_list(url: str, source: str, names: Collection[str], classes: tuple[str, ...]) -> list[str]:
    """Return the names of the files that a split list selects, each once, in the order of the list.

    Args:
        url: text file with a file per line, optionally followed by the number of its class from 1.
        source: the folder, for messages.
        names: files of the folder, relative to it.
        classes: names of the classes in the order of their numbers.

    Raises:
        ValueError: a line selects no file of the folder, or contradicts the class numbers; the message names the line.
    """
    resolver = _NameResolver(names)
    class_numbers = {name: number for number, name in enumerate(classes, 1)}
    selected: dict[str, None] = {}
    for line in read_lines(url):
        where = f"{url} line {line.number}"
        entry = resolver.find(line.text)
        if entry is None:
            if line.is_comment:
                continue
            raise ValueError(f"{where}: {source} has no {printable(_presumed_name(line.text))}")
        prefix = resolver.check_prefix(entry.prefix, line.number)
        if prefix is not None:
            raise ValueError(
                f"{where}: the list puts this file into the folder {entry.prefix}, but that of line {prefix[1]} into "
                f"{prefix[0]}, and {source} has neither; pack the folder that contains both"
            )
        _check_class_number(where, entry, class_numbers)
        selected[entry.name] = None
    if not selected:
        raise ValueError(f"{url} lists no files")
    return list(selected)


def _presumed_name(text: str) -> str:
    match = _LINE_END.match(text)
    return match["name"] if match and match["end"].isdecimal() else text


def _check_class_number(where: str, entry: _Entry, class_numbers: Mapping[str, int]) -> None:
    if not entry.class_number:
        return
    class_name = entry.name.split("/")[0] if "/" in entry.name else "all"
    number = class_numbers[class_name]
    if entry.class_number == class_name or entry.class_number == str(number):
        return
    if not re.fullmatch(r"[+-]?\d+", entry.class_number):
        raise ValueError(
            f"{where}: {printable(entry.name)} is followed by {printable(entry.class_number)}, which is not the number "
            f"of its class; write the number {number}, or nothing"
        )
    raise ValueError(
        f"{where}: {printable(entry.name)} has the class number {entry.class_number}, but its class is number "
        f"{number} of {len(class_numbers)}, counted from 1; copy the list's {_CLASS_INDEX_FILE} next to it"
    )


@dataclass(frozen=True)
class _Entry:
    """A line of a split list: a file of the folder, the rest of the line, and folders that the line adds in front."""

    name: str
    class_number: str = ""
    prefix: str = ""


class _NameResolver:
    """Finds the files of a folder that lines of text mean."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._by_normal_form: dict[str, str] | None = None
        self._prefix: tuple[str, int] | None = None

    def find(self, text: str) -> _Entry | None:
        """Return the file that a line means, taking the line apart from its end; None if there is none."""
        for candidate, end in _split_from_end(text):
            for variant in _spellings(candidate):
                if (entry := self._find_name(variant, end)) is not None:
                    return entry
        return None

    def check_prefix(self, prefix: str, line_number: int) -> tuple[str, int] | None:
        """Return the earlier prefix and its line if it differs: one list describes files below one folder."""
        if prefix and self._prefix is None:
            self._prefix = (prefix, line_number)
        return self._prefix if prefix and self._prefix and self._prefix[0] != prefix else None

    def _find_name(self, path: str, end: str) -> _Entry | None:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        for skipped in range(len(parts)):
            name = self._known_name("/".join(parts[skipped:]))
            if name is not None:
                return _Entry(name, end, "/".join(parts[:skipped]))
        return None

    def _known_name(self, name: str) -> str | None:
        if name in self._names:
            return name
        if name.isascii():
            return None
        # Systems differ in how they compose accented letters.
        if self._by_normal_form is None:
            self._by_normal_form = {unicodedata.normalize("NFC", each): each for each in self._names}
        return self._by_normal_form.get(unicodedata.normalize("NFC", name))


def _split_from_end(text: str) -> Iterator[tuple[str, str]]:
    """Yield the whole line, then the line without a class number, a comment, or both at its end."""
    yield text, ""
    # Spreadsheets separate empty cells, too.
    if (without_cells := text.rstrip(" \t,;")) != text:
        yield from _split_from_end(without_cells)
    match = _LINE_END.match(text)
    comment = re.match(r"^(.*?\S)\s+#.*$", text)
    if comment and comment[1] != text:
        yield from _split_from_end(comment[1])
    if match:
        yield match["name"], match["end"]


def _spellings(name: str) -> Iterator[str]:
    yield name
    if len(name) > 1 and name[0] in "\"'" and name[-1] == name[0]:
        name = name[1:-1]
        yield name
    if "\\" in name:
        yield re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/"))


def read_class_order(split_list: str, class_names: Iterable[str]) -> tuple[str, ...]:
    """Return the class names in the order of `classInd.txt` next to a split list; empty without that file.

    Raises:
        ValueError: the file does not number the classes from 1, each once; the message names the line.
    """
    url = storage.join(posixpath.dirname(split_list) or ".", _CLASS_INDEX_FILE)
    if not storage.exists(url):
        return ()
    by_number: dict[int, str] = {}
    for line in read_lines(url):
        match = re.fullmatch(r"(\d+)\s*[\s,;:]\s*(.+)", line.text)
        if match is None and line.is_comment:
            continue
        where = f"{url} line {line.number}"
        if match is None:
            raise ValueError(f"{where} must be a class number and a class, such as `1 Archery`: {printable(line.text)}")
        number, name = int(match[1]), match[2].strip("\"'")
        if number in by_number or name in by_number.values():
            raise ValueError(f"{where} repeats the number or the class of an earlier line: {printable(line.text)}")
        by_number[number] = name
    if sorted(by_number) != list(range(1, len(by_number) + 1)):
        missing = next(n for n in range(1, len(by_number) + 2) if n not in by_number)
        raise ValueError(
            f"{url} must number the classes from 1, one `1 Class` per line; it has {len(by_number)} classes and no "
            f"number {missing}"
        )
    if unnumbered := set(class_names) - set(by_number.values()):
        raise ValueError(f"{url} does not number the class {printable(min(unnumbered))}")
    return tuple(by_number[number] for number in sorted(by_number))


def read_class_list(url: str) -> list[str]:
    """Return the lines of a class list, one per class; see `class_lookup`.

    Raises:
        ValueError: the list is empty, or two lines are equal.
    """
    numbers: dict[str, int] = {}
    for line in read_lines(url):
        if line.is_comment:
            continue
        if line.text in numbers:
            raise ValueError(f"{url} line {line.number} repeats line {numbers[line.text]}: {printable(line.text)}")
        numbers[line.text] = line.number
    if not numbers:
        raise ValueError(f"{url} lists no classes")
    return list(numbers)


def class_lookup(lines: list[str]) -> dict[str, int]:
    """Return the index of each class by every label that names it: a line, or its first word if no other has it.

    So `n01440764 tench, Tinca tinca` is found by `n01440764`, and `1 Archery` by `1`. If no line starts with a number,
    the classes are found by their numbers from 0, too.
    """
    first_words = [re.split(r"[\s,;]", line, maxsplit=1)[0] for line in lines]
    counts = Counter(first_words)
    lookup = {word: index for index, word in enumerate(first_words) if counts[word] == 1}
    if not any(word.isdecimal() for word in first_words):
        lookup |= {str(index): index for index in range(len(lines))}
    return lookup | {line: index for index, line in enumerate(lines)}
