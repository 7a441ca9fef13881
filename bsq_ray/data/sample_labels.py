"""Read the labels of samples in WebDataset shards, and number their classes.

{key}.cls, .class, .label, .target   a number, a name, or a WordNet id
{key}.json                           an object with a field such as "label"

labels ─all numbers below 65,536─▶ class n is number n
       ─larger numbers, or names─▶ the distinct labels in ascending order
       ─with a class list────────▶ the lines of the list
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bsq_ray.data.folder_listing import printable
from bsq_ray.data.split_list import class_lookup, read_class_list
from bsq_ray.data.text_lines import INVISIBLE_CHARACTERS, decode_text

TEXT_LABEL_SUFFIXES = (".cls", ".class", ".label", ".target")
JSON_SUFFIX = ".json"
# Larger files, such as the annotations of a whole data set, are not read.
MAX_LABEL_BYTES = 2**24
LARGE_LABELS = "label files of more than 16 MiB, which are not read"
# Fields of a JSON file that contain a label, in the order of preference.
LABEL_FIELDS = (
    "label", "class", "cls", "category", "target", "class_id", "label_id", "category_id", "class_index", "class_idx",
    "label_index", "label_idx", "class_name", "label_name", "category_name", "synset", "wnid",
)  # fmt: skip
# Larger numbers are ids; a class for each number up to them would be a list of the size of the largest one.
_MAX_CLASSES = 2**16
_MAX_LABEL_LEN = 1000
_INTEGER = re.compile(r"[+-]?[0-9]+(?:\.0*)?")

Label = int | str


@dataclass(frozen=True, slots=True)
class SampleLabel:
    """A label, and the member that contains it, for messages."""

    value: Label
    member: str


def parse_label(data: bytes, member: str) -> SampleLabel:
    """Read a text label.

    Args:
        data: content of the member.
        member: shard and name of the member, for messages.

    Raises:
        ValueError: the member is empty or has more than one line.
    """
    expected = "expected a class number from 0 or a class name"
    try:
        text = decode_text(data).strip(INVISIBLE_CHARACTERS + "\r\n\0")
    except ValueError as error:
        raise ValueError(f"{member} is not text; {expected}") from error
    if any(unicodedata.category(character) in ("Cc", "Cn") and not character.isspace() for character in text):
        raise ValueError(f"{member} is not text; {expected}")
    if not text:
        raise ValueError(f"{member} is empty; {expected}")
    if "\n" in text or len(text) > _MAX_LABEL_LEN:
        raise ValueError(f"{member} has more than one line or is too long; {expected}")
    return SampleLabel(label_value(text, member), member)


def parse_json_label(data: bytes, member: str, field: str | None) -> tuple[SampleLabel, str] | None:
    """Read the label of a JSON file.

    Args:
        data, member: see `parse_label`.
        field: field of the label, with dots between levels; None looks for one of `LABEL_FIELDS`.

    Returns:
        The label and its field; None without `field` if there is none.

    Raises:
        ValueError: the file is not a JSON object, has no field of this name, or its value is not a single label.
    """
    try:
        content = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{member} is not JSON: {error}; expected an object with a label") from error
    if not isinstance(content, dict):
        if field is None:
            return None
        raise ValueError(f"{member} is a JSON {type(content).__name__}; expected an object with the field {field}")
    if field is not None:
        value = _get_field(content, field)
        if value is None:
            raise ValueError(f"{member} has no field {field}; it has {_format_fields(content)}")
        return SampleLabel(_single_value(value, member, field), member), field
    name = next((name for name in LABEL_FIELDS if content.get(name) is not None), None)
    return None if name is None else (SampleLabel(_single_value(content[name], member, name), member), name)


def _get_field(content: dict[str, Any], field: str) -> Any:
    if field in content:
        return content[field]
    value: Any = content
    for part in field.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _format_fields(content: dict[str, Any]) -> str:
    return "the fields " + ", ".join(map(printable, content)) if content else "no fields"


def _single_value(value: Any, member: str, field: str) -> Label:
    if isinstance(value, list) and len(value) == 1:
        [value] = value
    is_label = isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not is_label or value == "":
        raise ValueError(
            f"{member}: the field {field} is {printable(json.dumps(value))[:60]}; expected a class number from 0 or a "
            "class name; choose the field with --label-field"
        )
    return label_value(str(value).strip(), member)


def label_value(text: str, member: str) -> Label:
    """Return the label that a text is: a number, or the text itself.

    Raises:
        ValueError: the number is negative.
    """
    if not _INTEGER.fullmatch(text):
        return text
    number = int(text.partition(".")[0])
    if number < 0:
        raise ValueError(f"{member} has the class {number}; classes are numbers from 0, or names")
    return number


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: in the order of their indices.
        indices: class of each sample.
        rule: text that explains the numbering; empty where a class is its label.
    """

    names: tuple[str, ...]
    indices: list[int]
    rule: str = ""


def number_classes(labels: Sequence[SampleLabel], class_list: str | None) -> Classes:
    """Number the classes of labels.

    Args:
        labels: of all samples.
        class_list: text file with a class per line, see `read_class_list`; None numbers the labels themselves.

    Raises:
        ValueError: the labels are partly numbers and partly names, or one is not in the list.
    """
    if class_list is not None:
        return _number_by_list(labels, class_list)
    numbers = [label for label in labels if isinstance(label.value, int)]
    if numbers and len(numbers) < len(labels):
        name = next(label for label in labels if isinstance(label.value, str))
        raise ValueError(
            f"{numbers[0].member} is the number {numbers[0].value}, but {name.member} is "
            f"'{printable(str(name.value))}'; "
            "use numbers or names for all samples, or map both to classes with `data index --class-list`"
        )
    largest = max((int(label.value) for label in numbers), default=-1)
    if numbers and largest < _MAX_CLASSES:
        return Classes(tuple(map(str, range(largest + 1))), [int(label.value) for label in numbers])
    values: list[Label] = sorted({label.value for label in labels})
    index_of = {value: index for index, value in enumerate(values)}
    kind = "numbers" if numbers else "names"
    first, last = printable(str(values[0])), printable(str(values[-1]))
    rule = f"the labels are {kind} from {first} to {last}; their classes are in ascending order"
    return Classes(tuple(map(str, values)), [index_of[label.value] for label in labels], rule)


def _number_by_list(labels: Sequence[SampleLabel], class_list: str) -> Classes:
    lines = read_class_list(class_list)
    lookup = class_lookup(lines)
    indices = []
    for label in labels:
        index = lookup.get(str(label.value))
        if index is None:
            raise ValueError(
                f"{label.member} is {printable(str(label.value))}, which is none of the {len(lines)} classes of "
                f"{class_list}"
            )
        indices.append(index)
    return Classes(tuple(lines), indices, f"the classes are the {len(lines)} lines of {class_list}")
