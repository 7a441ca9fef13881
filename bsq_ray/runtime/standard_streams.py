"""Standard streams that a command can always use: closed ones, and terminals with few characters."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ERROR_HANDLER = "bsq_ray.ascii"
# Typographic characters of the program's own texts, and the lines of tables.
_ASCII_FORMS = dict.fromkeys(map(chr, range(0x2500, 0x2580)), "+") | {
    **dict.fromkeys("–—─━═", "-"), **dict.fromkeys("│┃║", "|"), "…": "...", "→": "->", "←": "<-", "▶": ">", "×": "x",
    "·": ".", "•": "*", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "µ": "u", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip


def prepare_standard_streams() -> None:
    """Replace closed standard streams by /dev/null, and let the others print any text in their own encoding.

    A character that the encoding lacks is printed in an ASCII form, such as `->`, or escaped, such as `\\u732b`. Bytes
    of a file name that are not UTF-8 are escaped, too.
    """
    codecs.register_error(_ERROR_HANDLER, _encode_as_ascii)
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        # Python leaves out the streams that are closed when it starts.
        if getattr(sys, name) is None:
            setattr(sys, name, open(_open_null(fd), mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Not a stream that captures the output, such as a notebook's.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _open_null(fd: int) -> int:
    """Open /dev/null as the stream's own descriptor, so that child processes have it, unless a file has taken it."""
    null_fd = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(fd)
        own_fd = null_fd
    except OSError:
        own_fd = os.dup2(null_fd, fd)
        os.close(null_fd)
    os.set_inheritable(own_fd, True)
    return own_fd


def _encode_as_ascii(error: UnicodeError) -> tuple[str, int]:
    """Error handler of `codecs`: return the replacement of characters that cannot be encoded, and where to continue."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(_ASCII_FORMS.get(character, character) for character in error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode(), error.end
