"""Recognize what people often have in the place of a file: a pointer, a web page, the error of a server."""

from __future__ import annotations

import json
import re

_POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer; fetch the file with `git lfs pull`",
    b"version https://hawser.github.com/spec/": "a Git LFS pointer; fetch the file with `git lfs pull`",
    b"# xet version": "a Git Xet pointer; fetch the file with `git xet checkout`, or download it again",
    b"/annex/objects/": "a git-annex pointer; fetch the file with `git annex get`",
}
_COMPRESSION_FORMATS = {
    b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "Zstandard", b"BZh": "bzip2", b"7z\xbc\xaf": "7-Zip",
}  # fmt: skip
_HTML_PATTERN = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
_XML_PATTERN = re.compile(rb"\s*<(\?xml|Error)\b")
_XML_MESSAGE_PATTERN = re.compile(rb"<(?:Message|Code)>([^<]*)</")
_ERROR_KEYS = ("error", "errors", "message", "detail")
# Responses of servers are short; longer files are not parsed.
_MAX_RESPONSE_BYTES, _MAX_TEXT_BYTES, _MAX_QUOTED_CHARACTERS = 2**16, 400, 120


def describe_wrong_file(data: bytes) -> str:
    """Return a predicate such as "is empty", if the content is a common substitute of a file; otherwise "".

    Args:
        data: content of the file, or at least its first 64 KiB.
    """
    if not data:
        return "is empty"
    if not data.strip(b"\0"):
        return "contains only zeros, as after a crash while it was written; download or write it again"
    content = data.removeprefix(b"\xef\xbb\xbf")
    for start, description in _POINTERS.items():
        if content.startswith(start):
            return f"is {description}"
    for start, name in _COMPRESSION_FORMATS.items():
        if content.startswith(start):
            return f"is compressed ({name}); decompress it first"
    if content.startswith(b"HTTP/"):
        status = _quote(content.splitlines()[0])
        return f"is the response of a server with its headers{status}; download the file without them"
    if _HTML_PATTERN.match(content[:_MAX_RESPONSE_BYTES]):
        return "is a web page (HTML): the address is that of a page, or requires a login; download the file itself"
    if _XML_PATTERN.match(content) and len(content) <= _MAX_RESPONSE_BYTES:
        message = _XML_MESSAGE_PATTERN.search(content)
        return f"is the response of a server (XML{_quote(message[1]) if message else ''}); download the file again"
    error = _json_error(content)
    return f"is the response of a server (JSON{_quote(error.encode())}); download the file again" if error else ""


def describe_wrong_binary(data: bytes) -> str:
    """Return what `describe_wrong_file` returns, and recognize any short text in the place of a binary file."""
    description = describe_wrong_file(data)
    if description or len(data) > _MAX_TEXT_BYTES:
        return description
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    is_text = all(character.isprintable() or character.isspace() for character in text)
    return f"is a text{_quote(data)}; download the file again" if is_text else ""


def _json_error(content: bytes) -> str:
    """Return the error message in the JSON response of a server, or ""."""
    if not content.lstrip().startswith(b"{") or len(content) > _MAX_RESPONSE_BYTES:
        return ""
    try:
        response = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    return next((str(response[key]) for key in _ERROR_KEYS if response.get(key)), "")


def _quote(text: bytes) -> str:
    """Return a colon and the start of a text in one line."""
    line = " ".join(text.decode("utf-8", "replace").split())
    return f": {line[:_MAX_QUOTED_CHARACTERS]}{'…' if len(line) > _MAX_QUOTED_CHARACTERS else ''}"
