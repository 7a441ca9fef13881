"""List the images in tars and Parquet files, as ImageNet and other data sets are published.

    ILSVRC2012_img_train.tar        a tar per class: the name of the inner tar is the class
    ILSVRC2012_img_val.tar          flat; a text file gives the class of each image
    train-00000-of-00294.parquet    column `image` with `bytes`, column `label`; class names in the metadata of the hub
    shard-000000.tar                WebDataset: `{key}.jpg` with `{key}.cls` or `{key}.json`

Only headers, labels and footers are read.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bsq_ray import storage
from bsq_ray.data.file_list import IgnoredFiles
from bsq_ray.data.folder_listing import count_suffixes, leftover_name
from bsq_ray.data.pack_labels import number_labels, number_texts
from bsq_ray.data.pack_source import SourceFiles
from bsq_ray.data.pack_tars import list_tars
from bsq_ray.data.sample_labels import SampleLabel
from bsq_ray.data.tar_members import TAR_SUFFIX, is_tar_name
from bsq_ray.media.images import IMAGE_SUFFIXES
from bsq_ray.runtime.wrong_files import describe_wrong_binary

_PARQUET_SUFFIX = ".parquet"
_CONTAINER_SUFFIXES = (TAR_SUFFIX, _PARQUET_SUFFIX)
_MAX_LIST_THREADS = 16
_HEAD_BYTES = 2**16
_LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target")
_IMAGE_COLUMNS = ("image", "img", "jpg", "png")


def find_containers(source: str) -> tuple[list[str], IgnoredFiles]:
    """Return the tars or Parquet files that a source names, and what lies next to them; none for a folder of files.

    Args:
        source: a tar or Parquet file, a pattern with `*`, `?` or `[…]`, or a folder that contains such files but
            neither images nor subfolders. An existing file or folder is no pattern.

    Raises:
        ValueError: a pattern matches nothing, or there are tars and Parquet files.
    """
    ignored = IgnoredFiles("images")
    fs, path = storage.filesystem(source)
    with storage.translate_errors(source, "read"):
        if re.search(r"[*?[]", source) and not fs.exists(path):
            # Folders may have `[` and `?` in their names.
            paths = sorted(fs.glob(re.sub(r"[\[?]", r"[\g<0>]", path)) or fs.glob(path))
            if not paths and "*" in source:
                raise ValueError(f"{source} matches no files")
        elif source.lower().endswith(_CONTAINER_SUFFIXES) and fs.isfile(path):
            paths = [path]
        elif not fs.isdir(path):
            return [], ignored
        else:
            paths = _containers_of_folder(fs.ls(path, detail=True), ignored)
    urls = [each if storage.is_local(source) else fs.unstrip_protocol(each) for each in paths]
    found = _container_names(urls, source)
    if len(found) < len(urls):
        other = next(url for url in urls if url not in found)
        raise ValueError(f"{source} matches {other}, which is neither a tar nor a Parquet file")
    return found, ignored


def _containers_of_folder(entries: list[dict[str, Any]], ignored: IgnoredFiles) -> list[str]:
    """Return the tars and Parquet files of a folder, none if it has images or subfolders; count its other entries."""
    paths = []
    for entry in sorted(entries, key=lambda entry: str(entry["name"])):
        name = posixpath.basename(entry["name"].rstrip("/"))
        is_folder = entry["type"] == "directory"
        if leftover := leftover_name(f"{name}/" if is_folder else name):
            ignored.listing.leftovers[leftover] += 1
        elif name.startswith("."):
            ignored.leave_out("files with a name that starts with a dot", name)
        elif is_folder or name.lower().endswith(IMAGE_SUFFIXES):
            return []
        elif name.lower().endswith(_CONTAINER_SUFFIXES):
            paths.append(entry["name"])
        elif is_tar_name(name):
            ignored.leave_out("compressed tars, which are not read; unpack them first", name)
        else:
            ignored.other_suffixes.update(count_suffixes([name]))
    return paths


def _container_names(names: Sequence[str], source: str) -> list[str]:
    by_suffix = {suffix: [name for name in names if name.lower().endswith(suffix)] for suffix in _CONTAINER_SUFFIXES}
    if all(by_suffix.values()):
        first = " and ".join(posixpath.basename(found[0]) for found in by_suffix.values())
        raise ValueError(f"{source} has tars and Parquet files ({first}); pack one kind, with a pattern such as *.tar")
    return [name for found in by_suffix.values() for name in found]


def list_containers(
    urls: list[str], suffixes: tuple[str, ...], label_file: str | None
) -> tuple[SourceFiles, IgnoredFiles]:
    """List the files in tars or Parquet files, and count what else the tars contain.

    Args:
        urls: all of one format.
        suffixes: lowercase suffixes of the files to list in tars.
        label_file: see `label_names`; None takes the classes from the containers.

    Raises:
        ValueError: a file is damaged, has no images, or only some images have a class.
    """
    if not urls[0].lower().endswith(_PARQUET_SUFFIX):
        return list_tars(urls, suffixes, label_file)
    if label_file is not None:
        raise ValueError("a label file is for tars and folders; Parquet files have a column of labels")
    return _list_parquet(urls), IgnoredFiles("images")


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
    columns = [_plain_labels(content.labels) for content in contents if content.labels is not None]
    if not columns:
        return np.zeros(sum(sum(each.rows) for each in contents), np.int32), ("all",)
    if len(columns) < len(contents) or any(column.null_count for column in columns):
        raise ValueError(f"some rows of {urls[0]} and others have no label")
    are_texts = {pa.types.is_large_string(column.type) for column in columns}
    if len(are_texts) > 1:
        raise ValueError(f"the Parquet files have labels of different types, such as {urls[0]} and others")
    if are_texts == {True}:
        return number_texts([label for column in columns for label in column.to_pylist()])
    values_F = np.concatenate([_label_numbers(column, urls[0]) for column in columns])
    if values_F.min() < 0:
        raise ValueError(f"{urls[0]} has the label {values_F.min()}, as published test sets have; labels start at 0")
    class_names = contents[0].class_names
    if class_names and values_F.max() >= len(class_names):
        raise ValueError(f"{urls[0]} has the label {values_F.max()}, but its metadata names {len(class_names)} classes")
    if class_names:
        return values_F.astype(np.int32), class_names
    distinct, index_F = np.unique(values_F, return_inverse=True)
    labels, classes = number_labels([SampleLabel(int(value), urls[0]) for value in distinct])
    return labels[index_F], classes


def _plain_labels(column: pa.Array) -> pa.Array:
    """Return labels without an encoding, and texts as large strings."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pa.types.is_string(column.type) or pa.types.is_string_view(column.type)
    return column.cast(pa.large_string()) if is_text else column


def _label_numbers(column: pa.Array, url: str) -> np.ndarray:
    """Return the numbers of a column of labels, int64."""
    try:
        return column.cast(pa.int64()).to_numpy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if pa.types.is_integer(column.type):
            largest = pc.max(column).as_py()
            raise ValueError(f"{url} has the label {largest}; labels are at most {2**63 - 1}") from error
        if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
            raise ValueError(f"{url} has the label NaN; some rows have no label") from error
        raise ValueError(f"{url} has labels of the type {column.type}; they must be whole numbers or texts") from error


def _list_parquet_file(url: str) -> _ParquetContent:
    head = b""
    try:
        with storage.open_url(url) as stream:
            head = stream.read(_HEAD_BYTES)
            file = pq.ParquetFile(stream)
            schema, metadata = file.schema_arrow, file.metadata
            column = _image_column(schema, url)
            label_column = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
            table = file.read([label_column], use_threads=False) if label_column else None
    except pa.ArrowException as error:
        reason = describe_wrong_binary(head) or f"is not a readable Parquet file: {error}"
        raise ValueError(f"{url} {reason}") from error
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
