"""List the images in tars to pack, and their classes.

    ILSVRC2012_img_train.tar   a tar per class: the name of the inner tar is the class
    images.tar                 the folder of an image is its class
    shard-000000.tar           WebDataset: `{key}.jpg` with a label, see `sample_labels`

Only headers and labels are read. Every member is packed, is the label of one that is packed, or is counted.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from bsq_ray.data.file_list import IgnoredFiles, encode_name
from bsq_ray.data.index_shard import MASK_SUFFIXES
from bsq_ray.data.pack_labels import label_names, number_folders, number_labels
from bsq_ray.data.pack_source import SourceFiles
from bsq_ray.data.sample_labels import (
    JSON_SUFFIX,
    LARGE_LABELS,
    MAX_LABEL_BYTES,
    TEXT_LABEL_SUFFIXES,
    Label,
    SampleLabel,
    parse_json_label,
    parse_label,
)
from bsq_ray.data.shard_content import ShardContent, open_content
from bsq_ray.data.tar_members import TAR_SUFFIX, Member, describe_wrong_tar, iter_members, split_member_name

_MAX_LIST_THREADS = 16


@dataclass
class _TarContent:
    """Images and labels in a tar.

    Attributes:
        url: the tar.
        names, offsets, sizes: of the images.
        folders: name of the innermost folder, or of the inner tar, of each image.
        labels: label of each image, one object for each value; None for images without one.
        ignored: members that are neither images nor their labels.
    """

    url: str
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[SampleLabel | None] = field(default_factory=list)
    ignored: IgnoredFiles = field(default_factory=lambda: IgnoredFiles("images"))


@dataclass
class _Group:
    """Images and labels of one tar; appended and inner tars may have the same keys again.

    Attributes:
        folder: name of the inner tar; empty for other tars.
        start: position of the tar in the file.
        images: by their keys.
        labels: label files by key and suffix.
    """

    folder: str
    start: int
    images: dict[str, Member] = field(default_factory=dict)
    labels: dict[str, dict[str, Member]] = field(default_factory=dict)


def list_tars(urls: list[str], suffixes: tuple[str, ...], label_file: str | None) -> tuple[SourceFiles, IgnoredFiles]:
    """List the images in tars, and count the other members.

    Args:
        urls: of the tars.
        suffixes: lowercase suffixes of the files to list.
        label_file: see `label_names`; None takes the classes from the tars.

    Raises:
        ValueError: a tar is damaged, has a label that is not one, or only some images have a class.
    """
    with ThreadPoolExecutor(min(_MAX_LIST_THREADS, len(urls)), thread_name_prefix="list-tars") as pool:
        contents = list(pool.map(lambda url: _list_tar(url, suffixes, label_file is None), urls))
    ignored = IgnoredFiles("images")
    for content in contents:
        ignored.add(content.ignored)
    if not any(content.names for content in contents):
        reasons = "".join(f"; it has {line}" for line in ignored.describe())
        raise ValueError(f"{urls[0]} contains no files with {', '.join(suffixes)}{reasons}")
    labels_F, classes = _number_classes(contents, label_file)
    files = SourceFiles(
        pa.array([encode_name(name) for content in contents for name in content.names], pa.large_binary()),
        labels_F,
        np.array([size for content in contents for size in content.sizes], np.int64),
        classes,
        tuple(urls),
        np.repeat(np.arange(len(urls), dtype=np.int32), [len(content.names) for content in contents]),
        np.array([offset for content in contents for offset in content.offsets], np.int64),
    )
    return files, ignored


def _number_classes(contents: list[_TarContent], label_file: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if label_file is not None:
        return number_labels(label_names(label_file, [name for content in contents for name in content.names]))
    if not any(label for content in contents for label in content.labels):
        return number_folders([folder for content in contents for folder in content.folders])
    labels = []
    for content in contents:
        for name, label in zip(content.names, content.labels, strict=True):
            if label is None:
                raise ValueError(f"{content.url}: {name} has no class, but others have; label all images, or none")
            labels.append(label)
    return number_labels(labels)


def _list_tar(url: str, suffixes: tuple[str, ...], has_keys: bool) -> _TarContent:
    """List the images in a tar.

    Args:
        url, suffixes: see `list_tars`.
        has_keys: whether the label of an image is a file of the same key; otherwise such files are counted.
    """
    content = _TarContent(url)
    distinct: dict[Label, SampleLabel] = {}
    with open_content(url) as file:
        for group in _iter_groups(file, content, suffixes, has_keys):
            labels = _GroupLabels(file, group, content, distinct)
            for member in group.images.values():
                content.names.append(member.name)
                content.folders.append(group.folder or posixpath.basename(posixpath.dirname(member.name)))
                content.offsets.append(group.start + member.offset)
                content.sizes.append(member.size)
                content.labels.append(labels.label_of(member.name) if has_keys else None)
            labels.count_unused(
                "labels without an image of their key" if has_keys else "labels in place of which the label file counts"
            )
    return content


class _GroupLabels:
    """Reads the labels of the images of a tar, and counts those that are not used."""

    def __init__(
        self, file: ShardContent, group: _Group, content: _TarContent, distinct: dict[Label, SampleLabel]
    ) -> None:
        self._file, self._group, self._content, self._distinct = file, group, content, distinct
        self._labels: dict[str, SampleLabel | None] = {}

    def label_of(self, name: str) -> SampleLabel | None:
        """Return the label of an image, by its key up to the last dot or, as in webdataset, up to the first one."""
        keys = (parts[0] for rule in ("last-dot", "first-dot") if (parts := split_member_name(name, rule)))
        return next((label for key in keys if (label := self._label_of_key(key))), None)

    def count_unused(self, reason: str) -> None:
        """Count the labels of keys that no image has."""
        for key, by_suffix in self._group.labels.items():
            if key not in self._labels:
                for member in by_suffix.values():
                    self._content.ignored.leave_out(reason, member.name)

    def _label_of_key(self, key: str) -> SampleLabel | None:
        if key not in self._labels and key in self._group.labels:
            self._labels[key] = self._read_label(self._group.labels[key])
        return self._labels.get(key)

    def _read_label(self, by_suffix: dict[str, Member]) -> SampleLabel | None:
        """Return the label in the first of the files of a key that has one, and count the others."""
        label = None
        for suffix in sorted(by_suffix, key=(*TEXT_LABEL_SUFFIXES, JSON_SUFFIX).index):
            member = by_suffix[suffix]
            where = f"{self._content.url}: {member.name}"
            if label is not None:
                self._content.ignored.leave_out(f"{suffix} files of samples with another label", member.name)
            elif member.size > MAX_LABEL_BYTES:
                self._content.ignored.leave_out(LARGE_LABELS, member.name)
            elif suffix != JSON_SUFFIX:
                label = parse_label(self._read(member), where)
            elif (json_label := parse_json_label(self._read(member), where, None)) is not None:
                label = json_label[0]
            else:
                self._content.ignored.leave_out(".json files without a label field", member.name)
        return label and self._distinct.setdefault(label.value, label)

    def _read(self, member: Member) -> bytes:
        return self._file.read(self._group.start + member.offset, member.size)


def _iter_groups(
    file: ShardContent, content: _TarContent, suffixes: tuple[str, ...], has_keys: bool
) -> Iterator[_Group]:
    """Yield the images and labels of each tar in a file: the tars in it, and those that were appended to each other."""
    groups: dict[int, _Group] = {}
    for member in _read_members(file, content.url):
        if not member.reason and member.name.lower().endswith(TAR_SUFFIX):
            folder = posixpath.splitext(posixpath.basename(member.name))[0]
            inner: dict[int, _Group] = {}
            where = f"{content.url}: {member.name}"
            for inner_member in _read_members(file.part(member.offset, member.size), where):
                group = inner.setdefault(inner_member.part, _Group(folder, member.offset))
                _add_member(group, inner_member, content, suffixes, has_keys)
            yield from inner.values()
        else:
            _add_member(groups.setdefault(member.part, _Group("", 0)), member, content, suffixes, has_keys)
    yield from groups.values()


def _add_member(group: _Group, member: Member, content: _TarContent, suffixes: tuple[str, ...], has_keys: bool) -> None:
    """Add an image or a label to its group, or count the member."""
    parts = split_member_name(member.name, "last-dot")
    key, suffix = parts or ("", "")
    if member.reason:
        content.ignored.leave_out(member.reason, member.name)
    elif posixpath.basename(member.name).startswith("."):
        content.ignored.leave_out("files with a name that starts with a dot", member.name)
    elif suffix in suffixes:
        if not has_keys:
            key = f"{len(group.images)}"
        elif key in group.images:
            earlier = group.images[key]
            if earlier.name.lower().endswith(MASK_SUFFIXES) and suffix not in MASK_SUFFIXES:
                member, earlier = earlier, member
            content.ignored.leave_out("images whose key another one in the tar has", member.name)
            member = earlier
        group.images[key] = member
    elif parts and suffix in (*TEXT_LABEL_SUFFIXES, JSON_SUFFIX):
        if suffix in group.labels.setdefault(key, {}):
            content.ignored.leave_out("labels whose key occurs earlier in the tar", member.name)
        else:
            group.labels[key][suffix] = member
    else:
        content.ignored.other_suffixes[suffix] += 1


def _read_members(file: ShardContent, where: str) -> Iterator[Member]:
    try:
        yield from iter_members(file)
    except (tarfile.TarError, EOFError) as error:
        reason = describe_wrong_tar(file, posixpath.basename(where)) or f"is not a readable tar: {error}"
        raise ValueError(f"{where} {reason}") from error
