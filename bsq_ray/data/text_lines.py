"""Read text that people edit: split lists, class lists, labels.

Editors add byte-order marks, write UTF-16 and end lines in three ways; people add comments and empty lines.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from bsq_ray import storage

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # The mark of UTF-32 starts with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# White space, marks, and the end-of-file character of DOS, which editors and shells leave at the ends of a text.
INVISIBLE_CHARACTERS = " \t\v\f\ufeff\u00a0\u200b\x1a"


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line of a text file.

    Attributes:
        number: from 1, of the lines of the file.
        text: without surrounding white space.
    """

    number: int
    text: str

    @property
    def is_comment(self) -> bool:
        """True if the line starts with "#"; a reader that knows a name with that start may prefer the name."""
        return self.text.startswith("#")


def decode_text(data: bytes) -> str:
    """Decode text of any editor: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Bytes that are not UTF-8 become surrogates, as in file names, so that they match the names of a folder.

    Raises:
        ValueError: the data is not text.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decode(data[len(mark) :], encoding)
    # The end of a C string, or of a file that a power cut left unwritten.
    content = data.rstrip(b"\0")
    if b"\0" in content:
        # Text of Latin letters in UTF-16 has a zero in every second byte.
        return _decode(data, "utf-16-be" if data[:1] == b"\0" else "utf-16-le")
    return content.decode("utf-8", "surrogateescape")


def _decode(data: bytes, encoding: str) -> str:
    try:
        text = data.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError("it is not text") from error
    if "\0" in text:
        raise ValueError("it is not text")
    return text


def read_lines(url: str) -> list[TextLine]:
    """Read the lines of a text file without the empty ones.

    Raises:
        ValueError: the file does not exist or is not text; the message names it.
    """
    try:
        text = decode_text(storage.read_bytes(url))
    except ValueError as error:
        raise ValueError(str(error) if url in str(error) else f"{url} is not a text file") from error
    # `splitlines` would also cut at characters that names may contain.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    numbered = (TextLine(number, line.strip(INVISIBLE_CHARACTERS)) for number, line in enumerate(lines, 1))
    return [line for line in numbered if line.text]
