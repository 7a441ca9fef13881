"""List the images in tars and Parquet files, as ImageNet and other data sets are published.

    ILSVRC2012_img_train.tar        a tar per class: the name of the inner tar is the class
    ILSVRC2012_img_val.tar          flat; a text file gives the class of each image
    train-00000-of-00294.parquet    column `image` with `bytes`, column `label`; class names in the metadata of the hub
    shard-000000.tar                WebDataset: `{key}.jpg` with `{key}.cls`

Only headers, labels and footers are read.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import storage
from bsq_ray.data.file_list import encode_name
from bsq_ray.data.pack_source import SourceFiles
from bsq_ray.media.images import IMAGE_SUFFIXES

_CONTAINER_SUFFIXES = (".tar", ".parquet")
_MAX_LIST_THREADS = 16
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target")
_IMAGE_COLUMNS = ("image", "img", "jpg", "png")


def find_containers(source: str) -> list[str]:
    """Return the tars or Parquet files that a source names; none if it is a folder of files.

    Args:
        source: a tar or Parquet file, a pattern with `*`, or a folder that contains such files but neither images nor
            subfolders.

    Raises:
        ValueError: a pattern matches nothing, or there are tars and Parquet files.
    """
    fs, path = storage.filesystem(source)
    with storage.translate_errors(source, "read"):
        if "*" in source:
            paths = sorted(fs.glob(path))
            if not paths:
                raise ValueError(f"{source} matches no files")
        elif source.lower().endswith(_CONTAINER_SUFFIXES) and fs.isfile(path):
            paths = [path]
        elif not fs.isdir(path):
            return []
        else:
            entries = [
                each for each in fs.ls(path, detail=True) if not posixpath.basename(each["name"]).startswith(".")
            ]
            paths = sorted(each["name"] for each in entries if each["name"].lower().endswith(_CONTAINER_SUFFIXES))
            if any(each["type"] == "directory" or each["name"].lower().endswith(IMAGE_SUFFIXES) for each in entries):
                return []
    urls = [each if storage.is_local(source) else fs.unstrip_protocol(each) for each in paths]
    found = _container_names(urls, source)
    if len(found) < len(urls):
        other = next(url for url in urls if url not in found)
        raise ValueError(f"{source} matches {other}, which is neither a tar nor a Parquet file")
    return found


def _container_names(names: Sequence[str], source: str) -> list[str]:
    by_suffix = {suffix: [name for name in names if name.lower().endswith(suffix)] for suffix in _CONTAINER_SUFFIXES}
    if all(by_suffix.values()):
        first = " and ".join(posixpath.basename(found[0]) for found in by_suffix.values())
        raise ValueError(f"{source} has tars and Parquet files ({first}); pack one kind, with a pattern such as *.tar")
    return [name for found in by_suffix.values() for name in found]


def list_containers(urls: list[str], suffixes: tuple[str, ...], label_file: str | None) -> SourceFiles:
    """List the files in tars or Parquet files.

    Args:
        urls: all of one format.
        suffixes: lowercase suffixes of the files to list in tars.
        label_file: see `read_label_file`; None takes the classes from the containers.

    Raises:
        ValueError: a file is damaged, has no images, or only some images have a class.
    """
    if urls[0].lower().endswith(".parquet"):
        if label_file is not None:
            raise ValueError("a label file is for tars and folders; Parquet files have a column of labels")
        return _list_parquet(urls)
    return _list_tars(urls, suffixes, label_file)


@dataclass
class _TarContent:
    """Images and labels in a tar; the label of an image is in the file of the same key, or the name of its folder."""

    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    class_files: dict[str, str] = field(default_factory=dict)


def _list_tars(urls: list[str], suffixes: tuple[str, ...], label_file: str | None) -> SourceFiles:
    with ThreadPoolExecutor(min(_MAX_LIST_THREADS, len(urls)), thread_name_prefix="list-tars") as pool:
        contents = list(pool.map(lambda url: _list_tar(url, suffixes), urls))
    if not any(content.names for content in contents):
        raise ValueError(f"{urls[0]} contains no files with {', '.join(suffixes)}")
    labels = [label for content in contents for label in _labels_of(content)]
    if label_file is not None:
        labels = label_names(label_file, [name for content in contents for name in content.names])
    missing = [label for label in labels if not label]
    if missing and len(missing) < len(labels):
        raise ValueError(f"{len(missing)} of {len(labels)} files in {urls[0]} and others have no class")
    labels_F, classes = number_labels(labels)
    return SourceFiles(
        pa.array([encode_name(name) for content in contents for name in content.names], pa.large_binary()),
        labels_F,
        np.array([size for content in contents for size in content.sizes], np.int64),
        classes,
        tuple(urls),
        np.repeat(np.arange(len(urls), dtype=np.int32), [len(content.names) for content in contents]),
        np.array([offset for content in contents for offset in content.offsets], np.int64),
    )


def _list_tar(url: str, suffixes: tuple[str, ...]) -> _TarContent:
    content = _TarContent()
    try:
        with storage.open_url(url) as file:
            for member, folder, start in _iter_files(file):
                base_name = posixpath.basename(member.name)
                key, suffix = posixpath.splitext(member.name)
                if base_name.startswith("."):
                    continue
                if suffix.lower() in suffixes:
                    content.names.append(member.name)
                    content.folders.append(folder or posixpath.basename(posixpath.dirname(member.name)))
                    content.offsets.append(start + member.offset_data)
                    content.sizes.append(member.size)
                elif suffix == ".cls":
                    file.seek(start + member.offset_data)
                    content.class_files[key] = file.read(member.size).decode("utf-8", "replace").strip()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{url} is not a readable tar: {error}") from error
    return content


def _iter_files(file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str, int]]:
    """Yield the files of a tar and of the tars in it: header, name of the inner tar, and its position."""
    with tarfile.open(fileobj=file, mode="r:") as outer:
        for member in outer:
            if member.isreg() and member.name.lower().endswith(".tar"):
                folder = posixpath.splitext(posixpath.basename(member.name))[0]
                inner_file = outer.extractfile(member)
                assert inner_file is not None
                with tarfile.open(fileobj=inner_file, mode="r:") as inner:
                    yield from ((each, folder, member.offset_data) for each in inner if each.isreg())
            elif member.isreg():
                yield member, "", 0


def _labels_of(content: _TarContent) -> list[str]:
    if not content.class_files:
        return content.folders
    return [content.class_files.get(posixpath.splitext(name)[0], "") for name in content.names]


def number_labels(labels: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the class of each label, int32, and the names of the classes: numbers stay, names are sorted."""
    names = set(labels)
    if names == {""}:
        return np.zeros(len(labels), np.int32), ("all",)
    if all(name.isdecimal() for name in names):
        return np.array(labels, np.int32), tuple(str(label) for label in range(max(map(int, names)) + 1))
    number_of = {name: number for number, name in enumerate(sorted(names))}
    return np.array([number_of[label] for label in labels], np.int32), tuple(number_of)


def label_names(label_file: str, names: Sequence[str]) -> list[str]:
    """Return the class of each file from a text file.

    The text has a class per line, in the sorted order of the files; or a file name and its class per line, separated by
    a space or comma, such as `LOC_val_solution.csv` of ImageNet.

    Raises:
        ValueError: the number of lines differs, a file has no line, or the classes are the numbers of the ILSVRC
            development kit, which differ from those of sorted synsets.
    """
    lines = [line.replace(",", " ").split() for line in storage.read_text(label_file).splitlines() if line.strip()]
    if lines and lines[0][0] == "ImageId":
        lines = lines[1:]
    if not lines:
        raise ValueError(f"{label_file} is empty")
    if all(len(words) == 1 for words in lines):
        if all(words[0].isdecimal() for words in lines):
            raise ValueError(
                f"{label_file} has numbers ({lines[0][0]}, …), which do not name the classes of the training set; "
                "use a list with a synset (such as n01440764) per line"
            )
        if len(lines) != len(names):
            raise ValueError(f"{label_file} has {len(lines)} lines for {len(names)} files")
        class_of = dict(zip(sorted(names), (words[0] for words in lines), strict=True))
        return [class_of[name] for name in names]
    by_stem = {posixpath.splitext(posixpath.basename(words[0]))[0]: words[1] for words in lines if len(words) > 1}
    stems = [posixpath.splitext(posixpath.basename(name))[0] for name in names]
    if unknown := [name for name, stem in zip(names, stems, strict=True) if stem not in by_stem]:
        raise ValueError(f"{label_file} has no class for {len(unknown)} of {len(names)} files, such as {unknown[0]}")
    return [by_stem[stem] for stem in stems]


@dataclass(frozen=True)
class _ParquetContent:
    labels: pa.Array | None
    class_names: tuple[str, ...]
    column: str
    rows: list[int]
    sizes: list[int]


def _list_parquet(urls: list[str]) -> SourceFiles:
    with ThreadPoolExecutor(min(_MAX_LIST_THREADS, len(urls)), thread_name_prefix="list-parquet") as pool:
        contents = list(pool.map(_list_parquet_file, urls))
    first = contents[0]
    if any((each.column, each.class_names) != (first.column, first.class_names) for each in contents):
        raise ValueError(f"the Parquet files have different columns or class names, such as {urls[0]} and others")
    rows = [count for content in contents for count in content.rows]
    row_F = np.concatenate([np.arange(count) for count in rows]) if rows else np.empty(0, np.int64)
    group_F = np.concatenate([np.repeat(np.arange(len(each.rows)), each.rows) for each in contents]).astype(np.int32)
    if not len(row_F):
        raise ValueError(f"{urls[0]} has no rows")
    names = [b"row %d" % number for each in contents for number in range(sum(each.rows))]
    labels_F, classes = _parquet_labels(contents, urls)
    return SourceFiles(
        pa.array(names, pa.large_binary()),
        labels_F,
        np.repeat([size for each in contents for size in each.sizes], rows).astype(np.int64),
        classes,
        tuple(urls),
        np.repeat(np.arange(len(urls), dtype=np.int32), [sum(each.rows) for each in contents]),
        row_F,
        group_F,
        first.column,
    )


def _parquet_labels(contents: list[_ParquetContent], urls: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    columns = [content.labels for content in contents if content.labels is not None]
    if not columns:
        return np.zeros(sum(sum(each.rows) for each in contents), np.int32), ("all",)
    if len(columns) < len(contents) or any(column.null_count for column in columns):
        raise ValueError(f"some rows of {urls[0]} and others have no label")
    if pa.types.is_string(columns[0].type) or pa.types.is_large_string(columns[0].type):
        return number_labels([label for column in columns for label in column.to_pylist()])
    labels_F = np.concatenate([column.to_numpy(zero_copy_only=False) for column in columns]).astype(np.int32)
    if labels_F.min() < 0:
        raise ValueError(f"{urls[0]} has the label {labels_F.min()}, as published test sets have; labels start at 0")
    class_names = contents[0].class_names or tuple(str(label) for label in range(labels_F.max() + 1))
    if labels_F.max() >= len(class_names):
        raise ValueError(f"{urls[0]} has the label {labels_F.max()}, but its metadata names {len(class_names)} classes")
    return labels_F, class_names


def _list_parquet_file(url: str) -> _ParquetContent:
    try:
        with storage.open_url(url) as stream:
            file = pq.ParquetFile(stream)
            schema, metadata = file.schema_arrow, file.metadata
            column = _image_column(schema, url)
            label_column = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
            table = file.read([label_column], use_threads=False) if label_column else None
    except pa.ArrowException as error:
        raise ValueError(f"{url} is not a readable Parquet file: {error}") from error
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    class_names = tuple((hub.get(label_column) or {}).get("names") or ()) if label_column else ()
    return _ParquetContent(
        table.column(0).combine_chunks() if table is not None else None,
        class_names,
        column,
        [group.num_rows for group in groups],
        [group.total_byte_size // max(1, group.num_rows) for group in groups],
    )


def _image_column(schema: pa.Schema, url: str) -> str:
    """Return the name of the column with encoded images, for `read_row_group`."""
    for column in schema:
        if pa.types.is_struct(column.type) and "bytes" in [each.name for each in column.type]:
            return f"{column.name}.bytes"
    for column in schema:
        if column.name in _IMAGE_COLUMNS and (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            return str(column.name)
    raise ValueError(
        f"{url} has no column of images: no struct with `bytes`, and no binary {', '.join(_IMAGE_COLUMNS)}"
    )
