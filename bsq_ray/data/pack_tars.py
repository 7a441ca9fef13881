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
from bsq_ray.data.pack_labels import label_names, number_folders, number_labels
from bsq_ray.data.pack_source import SourceFiles
from bsq_ray.data.sample_labels import (
    JSON_SUFFIX,
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
        labels: label by the key of its file, one object for each value; text files come before JSON files.
        ignored: members that are neither images nor labels.
    """

    url: str
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: dict[str, SampleLabel] = field(default_factory=dict)
    ignored: IgnoredFiles = field(default_factory=lambda: IgnoredFiles("images"))

    def label_of(self, name: str) -> SampleLabel | None:
        """Return the label of an image, by its key up to the last dot or, as in webdataset, up to the first one."""
        keys = (parts[0] for rule in ("last-dot", "first-dot") if (parts := split_member_name(name, rule)))
        return next((self.labels[key] for key in keys if key in self.labels), None)


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
        contents = list(pool.map(lambda url: _list_tar(url, suffixes), urls))
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
    if not any(content.labels for content in contents):
        return number_folders([folder for content in contents for folder in content.folders])
    labels = []
    for content in contents:
        for name in content.names:
            label = content.label_of(name)
            if label is None:
                raise ValueError(f"{content.url}: {name} has no class, but others have; label all images, or none")
            labels.append(label)
    return number_labels(labels)


def _list_tar(url: str, suffixes: tuple[str, ...]) -> _TarContent:
    content = _TarContent(url)
    json_labels: dict[str, SampleLabel] = {}
    distinct: dict[Label, SampleLabel] = {}
    with open_content(url) as file:
        for member, folder, start in _iter_files(file, url):
            parts = split_member_name(member.name, "last-dot")
            suffix = parts[1] if parts else ""
            if member.reason:
                content.ignored.leave_out(member.reason, member.name)
            elif posixpath.basename(member.name).startswith("."):
                content.ignored.leave_out("files with a name that starts with a dot", member.name)
            elif suffix in suffixes:
                content.names.append(member.name)
                content.folders.append(folder or posixpath.basename(posixpath.dirname(member.name)))
                content.offsets.append(start + member.offset)
                content.sizes.append(member.size)
            elif parts and suffix in (*TEXT_LABEL_SUFFIXES, JSON_SUFFIX):
                data, where = file.read(start + member.offset, member.size), f"{url}: {member.name}"
                if suffix != JSON_SUFFIX:
                    label = parse_label(data, where)
                    content.labels[parts[0]] = distinct.setdefault(label.value, label)
                elif (json_label := parse_json_label(data, where, None)) is not None:
                    json_labels[parts[0]] = distinct.setdefault(json_label[0].value, json_label[0])
                else:
                    content.ignored.leave_out(".json files without a label field", member.name)
            else:
                content.ignored.other_suffixes[suffix] += 1
    content.labels = json_labels | content.labels
    return content


def _iter_files(file: ShardContent, url: str) -> Iterator[tuple[Member, str, int]]:
    """Yield the members of a tar and of the tars in it: member, name of the inner tar, and its position."""
    for member in _read_members(file, url):
        if member.reason or not member.name.lower().endswith(TAR_SUFFIX):
            yield member, "", 0
            continue
        folder = posixpath.splitext(posixpath.basename(member.name))[0]
        for inner in _read_members(file.part(member.offset, member.size), f"{url}: {member.name}"):
            yield inner, folder, member.offset


def _read_members(file: ShardContent, where: str) -> Iterator[Member]:
    try:
        yield from iter_members(file)
    except (tarfile.TarError, EOFError) as error:
        reason = describe_wrong_tar(file, posixpath.basename(where)) or f"is not a readable tar: {error}"
        raise ValueError(f"{where} {reason}") from error
