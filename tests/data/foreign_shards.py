"""Small tars as other programs write them, from a list of members."""

import io
import tarfile
from dataclasses import dataclass

from PIL import Image


def image_bytes(number=0, image_format="JPEG"):
    """Return a small image file; each number gives another color."""
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (number * 37 % 256, number * 91 % 256, number * 11 % 256)).save(file, image_format)
    return file.getvalue()


@dataclass
class Link:
    """A link as the content of a member."""

    target: str
    kind: bytes = tarfile.SYMTYPE


def write_tar(path, members, mode="w", tar_format=tarfile.PAX_FORMAT):
    """Write a tar.

    Args:
        path: file to write.
        members: pairs of a name and its content: bytes, text, a `Link`, or None for a folder.
        mode: of `tarfile.open`, such as "w:gz".
        tar_format: of the headers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tar_format) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            elif isinstance(content, Link):
                entry.type, entry.linkname = content.kind, content.target
                tar.addfile(entry)
            else:
                data = content.encode() if isinstance(content, str) else content
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def samples(count=6, name="n{:03}", label=lambda number: str(number % 3), suffix="jpg", label_suffix="cls"):
    """Return members of samples, each an image and its label; no labels if `label` is None."""
    members = []
    for number in range(count):
        key = name.format(number)
        members.append((f"{key}.{suffix}", image_bytes(number)))
        if label is not None:
            members.append((f"{key}.{label_suffix}", label(number)))
    return members
