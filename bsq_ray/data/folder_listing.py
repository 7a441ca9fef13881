"""List the files of a folder and its subfolders: the only way in which commands look into folders of data.

    folder ─follow links, end loops─▶ entries ─without leftovers of systems and tools─▶ files
                                              └▶ counted in `FolderListing`: leftovers, broken links, loops

Files that operating systems, editors, downloads and version control leave in folders are no data anywhere.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from bsq_ray import storage

# Names are compared in lowercase. A folder whose name starts with a dot is a leftover, too.
_LEFTOVER_FOLDERS = (
    "__macosx", "@eadir", "@recycle", "#recycle", "@recently-snapshot", "$recycle.bin", "recycler", "recycled",
    "lost+found", "system volume information", "network trash folder", "temporary items", "__pycache__", "cvs",
    "*.part", "*.partial", "*.crdownload", "*.download",
)  # fmt: skip
_LEFTOVER_FILES = (
    "._*", ".ds_store", "thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini",
    "*:zone.identifier",
    "icon\r", ".localized", ".directory", ".nomedia", ".picasa.ini", "picasa.ini", ".bridgecache*",
    ".gitignore", ".gitattributes", ".gitkeep", ".gitmodules", ".keep", ".dropbox", ".dropbox.attr",
    "*~", "~$*", ".~*", "*.swp", "*.swo", "*.tmp", "*.temp", "*.bak", "*.part", "*.partial", "*.filepart",
    "*.crdownload", "*.download", "*.opdownload", "*.aria2", "*.!ut", "*.!qb", "*.lock",
    ".nfs*", ".fuse_hidden*", ".goutputstream-*", ".syncthing.*", "~syncthing~*",
)  # fmt: skip
_LEFTOVER_FOLDER_PATTERN, _LEFTOVER_FILE_PATTERN = (
    re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns), re.IGNORECASE)
    for patterns in (_LEFTOVER_FOLDERS, _LEFTOVER_FILES)
)
# Image formats that other programs write and this package does not read.
_OTHER_IMAGE_SUFFIXES = {
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".xcf", ".svg", ".eps", ".ai", ".ico",
    ".tga", ".dds", ".exr", ".hdr", ".pfm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pef",
    ".srw", ".raw", ".rwl", ".nrw", ".x3f", ".3fr", ".iiq", ".gpr", ".qoi", ".bpg", ".wdp", ".dcm", ".fits", ".apng",
    ".pcx", ".sgi",
}  # fmt: skip
_MAX_LISTED = 6


@dataclass(frozen=True)
class FoundFile:
    """A file of a folder.

    Attributes:
        name: path relative to the folder, with "/" between its parts.
        path: path or URL for `storage`.
        size: bytes.
    """

    name: str
    path: str
    size: int


@dataclass
class FolderListing:
    """Counts of what `walk_files` does not yield.

    Attributes:
        leftovers: number of leftover files and folders, by their name or the pattern of it.
        broken_links: names of links without a target.
        loops: names of links to a folder that contains them.
    """

    leftovers: Counter[str] = field(default_factory=Counter)
    broken_links: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """Return a line for each kind of entry that was left out."""
        lines = []
        if self.leftovers:
            lines.append(f"{self.leftovers.total()} leftovers of systems and tools: {format_counts(self.leftovers)}")
        for names, text in ((self.broken_links, "broken links"), (self.loops, "links to a folder that contains them")):
            if names:
                lines.append(f"{len(names)} {text}: {format_names(names)}")
        return lines


def leftover_name(name: str) -> str | None:
    """Return the part of a relative path that is a leftover of a system or tool; None if no part is."""
    *folders, file_name = name.split("/")
    for folder in folders:
        if folder not in ("", ".", "..") and (folder.startswith(".") or _LEFTOVER_FOLDER_PATTERN.match(folder)):
            return folder
    return file_name if _LEFTOVER_FILE_PATTERN.match(file_name) else None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sorting key that compares numbers as numbers: 1, 2, 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    # The text decides between equal numbers, such as 1 and 01.
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts] + [(-1, 0, name)]


def walk_files(url: str, listing: FolderListing | None = None) -> Iterator[FoundFile]:
    """Yield the files of a folder and its subfolders, each folder in the order of its names.

    Links to files and folders are followed; a link to a folder that contains it ends there.

    Args:
        url: folder, as a path or fsspec URL.
        listing: receives counts of everything else.

    Raises:
        ValueError: the folder does not exist, is a file, or cannot be read.
    """
    listing = FolderListing() if listing is None else listing
    fs, root = storage.filesystem(url)
    with storage.translate_errors(url, "read"):
        if not fs.isdir(root):
            raise ValueError(f"{url} is not a folder" if fs.exists(root) else f"{url} does not exist")
        if storage.is_local(url):
            yield from _walk_local(root, "", (), listing)
            return
        for folder, _, files in fs.walk(root, detail=True):
            # Otherwise the file system keeps an object for every file.
            fs.invalidate_cache(folder)
            for _, info in sorted(files.items()):
                name = posixpath.relpath(info["name"], root)
                leftover = leftover_name(name)
                if leftover is not None:
                    listing.leftovers[_leftover_group(leftover)] += 1
                elif not info["name"].endswith("/") and info["name"].strip("/") != folder.strip("/"):
                    yield FoundFile(name, fs.unstrip_protocol(info["name"]), info["size"] or 0)


def _walk_local(
    folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...], listing: FolderListing
) -> Iterator[FoundFile]:
    folder_stat = os.stat(folder)
    identity = (folder_stat.st_dev, folder_stat.st_ino)
    if identity in ancestors:
        listing.loops.append(prefix.rstrip("/"))
        return
    with os.scandir(folder) as iterator:
        entries = sorted(iterator, key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        try:
            entry_stat = entry.stat()
        except OSError:
            if leftover_name(entry.name) is None:
                listing.broken_links.append(name)
            else:
                listing.leftovers[_leftover_group(entry.name)] += 1
            continue
        is_folder = stat.S_ISDIR(entry_stat.st_mode)
        if leftover_name(f"{entry.name}/" if is_folder else entry.name) is not None:
            listing.leftovers[_leftover_group(entry.name)] += 1
        elif is_folder:
            yield from _walk_local(entry.path, f"{name}/", (*ancestors, identity), listing)
        elif stat.S_ISREG(entry_stat.st_mode):
            yield FoundFile(name, entry.path, entry_stat.st_size)


def _leftover_group(name: str) -> str:
    """Return what counts leftovers of one kind together: `._*` for every AppleDouble file."""
    if name.startswith("._"):
        return "._*"
    if name.endswith("~"):
        return "*~"
    if name.lower().endswith(":zone.identifier"):
        # The note of Windows that a file was downloaded.
        return f"*:{name.rpartition(':')[2]}"
    suffix = posixpath.splitext(name)[1].lower()
    return f"*{suffix}" if f"*{suffix}" in _LEFTOVER_FILES else name


def count_suffixes(names: Iterator[str] | list[str]) -> Counter[str]:
    """Count file names by their lowercase suffix; "" for names without one."""
    return Counter(posixpath.splitext(name)[1].lower() for name in names)


def describe_other_files(suffixes: Counter[str], kind: str) -> str:
    """Return a line about files of other types, such as "3 files of other types: .heic (2), .txt (1)".

    Args:
        suffixes: number of files by suffix.
        kind: "images" or "videos"; among images, formats that are not read are pointed out.
    """
    named = Counter({suffix or "no suffix": count for suffix, count in suffixes.items()})
    line = f"{suffixes.total()} files of other types: {format_counts(named)}"
    unread = sorted(suffix for suffix in suffixes if suffix in _OTHER_IMAGE_SUFFIXES)
    if kind == "images" and unread:
        verb = "is an image format that is not read" if len(unread) == 1 else "are image formats that are not read"
        line += f"; {', '.join(unread)} {verb}, convert these files to .jpg or .png"
    return line


def format_counts(counts: Counter[str]) -> str:
    """Return "a (3), b (1)", the most common first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{printable(name)} ({count})" for name, count in ordered[:_MAX_LISTED]]
    return ", ".join([*texts, *(["…"] if len(ordered) > _MAX_LISTED else [])])


def format_names(names: list[str]) -> str:
    """Return the first names, with an ellipsis if there are more."""
    return ", ".join([*map(printable, names[:_MAX_LISTED]), *(["…"] if len(names) > _MAX_LISTED else [])])


def printable(name: str) -> str:
    """Return a file name for a message: bytes that are not UTF-8 and control characters are escaped."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
