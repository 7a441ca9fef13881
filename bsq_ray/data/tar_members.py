"""Read the members of WebDataset tars: keys, suffixes, links, and the position of each member's data.

`split_member_name` is the only rule for keys: the index uses it, and the shard reader checks names with it.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bsq_ray.data.folder_listing import leftover_name
from bsq_ray.data.shard_content import ShardContent
from bsq_ray.media.decode_error import error_text
from bsq_ray.runtime.wrong_files import describe_wrong_binary

KeyUntil = Literal["first-dot", "last-dot"]
"""The end of a member's key: the first dot of its base name, as in the package `webdataset`, or the last one."""

TAR_SUFFIX = ".tar"
_COMPRESSED_TAR_SUFFIXES = (
    ".tgz", ".taz", ".tbz", ".tbz2", ".tb2", ".txz", ".tlz", ".tzst", ".tar.gz", ".tar.z", ".tar.bz2", ".tar.xz",
    ".tar.lzma", ".tar.lz", ".tar.lz4", ".tar.zst", ".tar.zstd", ".tar.br", ".tar.sz", ".tar.lzo",
)  # fmt: skip
# First bytes of a file, its format, and the command that unpacks it; {} is the file.
_MAGIC_BYTES = (
    (b"\x1f\x8b", "gzip", "gzip -dc {} > {}.tar"),
    (b"\x1f\x9d", "compress", "gzip -dc {} > {}.tar"),
    (b"BZh", "bzip2", "bzip2 -dc {} > {}.tar"),
    (b"\xfd7zXZ\x00", "xz", "xz -dc {} > {}.tar"),
    (b"]\x00\x00", "lzma", "xz -dc {} > {}.tar"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc {} > {}.tar"),
    # A skippable frame, with which pzstd starts.
    (b"\x50\x2a\x4d\x18", "zstd", "zstd -dc {} > {}.tar"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc {} > {}.tar"),
    (b"\x02\x21\x4c\x18", "lz4", "lz4 -dc {} > {}.tar"),
    (b"LZIP", "lzip", "lzip -dc {} > {}.tar"),
    (b"\x89LZO", "lzop", "lzop -dc {} > {}.tar"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy", "snzip -dc {} > {}.tar"),
    (b"PK\x03\x04", "zip", "unzip {}"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x {}"),
    (b"Rar!", "RAR", "unrar x {}"),
)
_MAX_LINKS = 40
_HEAD_BYTES = 2**16


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        name: full name without a leading "./" or "/".
        offset, size: position and size of its data, bytes; of the target for a link.
        reason: the reason why it cannot be a part of a sample; empty for a readable file.
        part: number of the tar, from 0, in a file of tars that were appended to each other.
    """

    name: str
    offset: int = 0
    size: int = 0
    reason: str = ""
    part: int = 0


def is_tar_name(name: str) -> bool:
    """Return True if a file name is that of a tar, compressed or not."""
    return name.lower().endswith((TAR_SUFFIX, *_COMPRESSED_TAR_SUFFIXES))


def compressed_format(head: bytes, name: str) -> str | None:
    """Return how a shard is compressed and what to do about it, from its first bytes; None if it is not compressed."""
    for magic, format_name, command in _MAGIC_BYTES:
        if head.startswith(magic):
            stem = name.lower()
            for suffix in sorted((TAR_SUFFIX, *_COMPRESSED_TAR_SUFFIXES), key=len, reverse=True):
                stem = stem.removesuffix(suffix)
            output = name[: len(stem)]
            # The unpacked shard must not replace its source.
            output += "-unpacked" if f"{output}{TAR_SUFFIX}" == name else ""
            return f"compressed with {format_name}; unpack it: {command.format(name, output)}"
    return None


def describe_wrong_tar(content: ShardContent, name: str) -> str:
    """Return a predicate such as "is a Git LFS pointer; …" for a file that cannot be read as a tar, or ""."""
    head = content.read(0, _HEAD_BYTES)
    compression = compressed_format(head, name)
    return f"is not a plain tar file: it is {compression}" if compression else describe_wrong_binary(head)


def split_member_name(name: str, key_until: KeyUntil) -> tuple[str, str] | None:
    """Return the key of a member and its lowercase suffix with the dot; None if there is no key.

    Files with the same base name in two folders have different keys. The dots of folders do not matter.

    Args:
        name: name of the member.
        key_until: end of the key.
    """
    folder, base_name = posixpath.split(normal_name(name))
    if key_until == "first-dot":
        stem, dot, suffix = base_name.partition(".")
    else:
        stem, dot, suffix = base_name.rpartition(".")
    if not stem or not dot:
        return None
    return posixpath.join(folder, stem), f".{suffix.lower()}"


def is_member_of(name: str, key: str) -> bool:
    """Return True if a member name can have the key, by either rule of `split_member_name`."""
    rules: tuple[KeyUntil, ...] = ("first-dot", "last-dot")
    return any((parts := split_member_name(name, rule)) is not None and parts[0] == key for rule in rules)


def normal_name(name: str) -> str:
    """Return a member name without "./", "//" and a leading "/"; bytes that are not UTF-8 are escaped."""
    return posixpath.normpath(name).lstrip("/").encode("utf-8", "backslashreplace").decode()


def iter_members(content: ShardContent) -> Iterator[Member]:
    """Yield every file and link of a tar, in its order; folders are no members.

    Raises:
        tarfile.TarError, EOFError, ValueError: the tar is damaged or truncated.
    """
    all_entries, rest = _read_entries(content)
    entries = [(part, entry) for part, entry in all_entries if not entry.isdir()]
    # As when a tar is unpacked, the last of several entries with one name counts as the target of a link.
    by_name = {normal_name(entry.name): entry for _, entry in entries}
    for part, entry in entries:
        name = normal_name(entry.name)
        if leftover_name(name) is not None:
            yield Member(name, reason="leftovers of systems and tools")
            continue
        target = _follow_links(entry, by_name)
        if isinstance(target, str):
            yield Member(name, reason=target)
        elif not target.isreg():
            yield Member(name, reason="devices and pipes")
        elif target.issparse():
            yield Member(name, reason="sparse files; archive them without --sparse")
        elif target.offset_data + target.size > content.num_bytes:
            raise EOFError(f"it ends inside {name}")
        else:
            yield Member(name, target.offset_data, target.size, part=part)
    if rest is not None:
        yield Member(f"byte {rest}", reason="parts behind the end of the tar that are no tar")


def _read_entries(content: ShardContent) -> tuple[list[tuple[int, tarfile.TarInfo]], int | None]:
    """Return the headers of a tar, each with the number of its part, and the position of content that is no tar.

    Tars that were appended with `cat` are further parts.
    """
    entries = list[tuple[int, tarfile.TarInfo]]()
    start = part = 0
    while True:
        content.file.seek(start)
        end = start
        try:
            with tarfile.open(fileobj=content.file, mode="r:") as tar:
                for entry in tar:
                    # Otherwise `tarfile` would read the same header again, without end.
                    if entry.size < 0 or tar.offset <= entry.offset:
                        raise tarfile.ReadError(f"the header at byte {entry.offset} has a negative size")
                    if tar.offset >= content.num_bytes + tarfile.BLOCKSIZE:
                        raise EOFError(f"it ends inside {normal_name(entry.name)}")
                    entries.append((part, entry))
                end = tar.offset
        except (ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise tarfile.ReadError(f"a header is invalid: {error_text(error)}") from error
        # Zeros end a tar.
        next_tar = content.find_nonzero(end)
        if next_tar is None:
            return entries, None
        if next_tar < end + tarfile.BLOCKSIZE:
            if end > start:
                raise tarfile.ReadError(f"the header at byte {end} is invalid")
            # `tarfile` reports an invalid header only at the start of a file.
            return entries, next_tar
        start, part = next_tar // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE, part + 1


def _follow_links(entry: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | str:
    """Return the file that a link leads to, or the reason why there is none."""
    for _ in range(_MAX_LINKS):
        if not entry.issym() and not entry.islnk():
            return entry
        # The target of a hard link is a name in the tar, that of a symbolic link is relative to the folder of the link.
        folder = posixpath.dirname(normal_name(entry.name)) if entry.issym() else ""
        target = by_name.get(normal_name(posixpath.join(folder, entry.linkname)))
        if target is None:
            return "links to files that are not in the shard; archive with `tar --dereference`"
        entry = target
    return "links that form a loop"
