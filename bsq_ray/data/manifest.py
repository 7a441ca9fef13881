"""The manifest beside the shards: what they hold, and where in them each sample lies.

`manifest.parquet` has a row per shard. With the place of every image or video in it, a reader fetches the samples it
needs by ranged reads, in any order, and a truncated or replaced shard is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bsq_ray import storage

MANIFEST_FILE = "manifest.parquet"
_VERSION = 1
_VIDEOS_TYPE = pa.list_(
    pa.struct(
        {
            "frames": pa.int64(),
            "fps": pa.float64(),
            "width": pa.int64(),
            "height": pa.int64(),
            "key_frames": pa.list_(pa.int64()),
            "key_times": pa.list_(pa.int64()),
        }
    )
)


@dataclass(frozen=True)
class VideoInfo:
    """What reading clips out of a video needs to know of it.

    Attributes:
        frames: that can be decoded.
        fps: frames per second.
        width, height: pixels, upright.
        key_frames: numbers of the frames at which decoding can begin; the first is 0.
        key_times: their time stamps, in the units of the video stream.
    """

    frames: int
    fps: float
    width: int
    height: int
    key_frames: tuple[int, ...]
    key_times: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """One tar file of samples.

    Attributes:
        name: file name inside the data set's folder.
        bytes, sha256: of the whole file.
        keys: names of the samples, in the order of the tar.
        labels: class of each sample, an index into the manifest's classes.
        offsets, sizes: where each sample's image or video lies in the file, in bytes.
        videos: what is known of each sample's video; empty in a data set of images.
    """

    name: str
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    videos: tuple[VideoInfo, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A packed data set.

    Attributes:
        url: the folder of the shards.
        shards: in the order of the file.
        classes: names of the labels.
        kind: "images" or "videos".
    """

    url: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    kind: str = "images"

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """Number of samples before each shard, and the total last: int64 (shards + 1,)."""
        return np.concatenate([[0], np.cumsum([len(shard.keys) for shard in self.shards])]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return int(self.shard_starts[-1])

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the shards' names, contents and order: what a result names as its data set."""
        text = json.dumps([[shard.name, shard.sha256] for shard in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()

    def locate(self, sample: int) -> tuple[Shard, int]:
        """The shard that holds a sample (numbered through all shards), and its place there."""
        shard = int(np.searchsorted(self.shard_starts, sample, side="right")) - 1
        return self.shards[shard], int(sample - self.shard_starts[shard])


def read_manifest(url: str) -> Manifest:
    """Reads the manifest of a packed data set.

    Raises:
        ValueError: the folder holds no manifest, or it is damaged or of a newer version.
    """
    path = storage.join(url, MANIFEST_FILE)
    if not storage.exists(path):
        raise ValueError(
            f"{url} is not a packed data set: it has no {MANIFEST_FILE}. "
            f"Pack a folder of images or videos with `bsq-ray data pack FOLDER {url}`, or index shards that are there "
            f"already with `bsq-ray data index {url}`"
        )
    content, is_newer = storage.read_bytes(path), False
    try:
        # pq.read_table starts threads; those that are still there when the process ends abort it.
        table = pq.ParquetFile(io.BytesIO(content), pre_buffer=False).read(use_threads=False)
        metadata = json.loads((table.schema.metadata or {})[b"bsq_ray"])
        is_newer = metadata["version"] > _VERSION
        shards = tuple(_parse_shard(row) for row in table.to_pylist())
        classes, kind = tuple(metadata["classes"]), metadata["kind"]
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        # What a newer version writes need not be readable here.
        if not is_newer:
            raise ValueError(f"{path} is damaged or not a manifest of this program: {error}") from error
    if is_newer:
        raise ValueError(f"{path} was written by a newer version of bsq_ray; update it to read this data set")
    return Manifest(url, shards, classes, kind)


def _parse_shard(row: dict[str, Any]) -> Shard:
    videos = tuple(
        VideoInfo(**{**video, "key_frames": tuple(video["key_frames"]), "key_times": tuple(video["key_times"])})
        for video in row.get("videos", ())
    )
    keys, labels, offsets, sizes = (tuple(row[name]) for name in ("keys", "labels", "offsets", "sizes"))
    return Shard(row["name"], row["bytes"], row["sha256"], keys, labels, offsets, sizes, videos)


def write_manifest(manifest: Manifest) -> None:
    """Writes `manifest.parquet` in one step, after the shards it speaks of are there."""
    columns: dict[str, pa.Array] = {
        "name": pa.array([shard.name for shard in manifest.shards], pa.string()),
        "bytes": pa.array([shard.bytes for shard in manifest.shards], pa.int64()),
        "sha256": pa.array([shard.sha256 for shard in manifest.shards], pa.string()),
        "keys": pa.array([shard.keys for shard in manifest.shards], pa.list_(pa.string())),
        "labels": pa.array([shard.labels for shard in manifest.shards], pa.list_(pa.int64())),
        "offsets": pa.array([shard.offsets for shard in manifest.shards], pa.list_(pa.int64())),
        "sizes": pa.array([shard.sizes for shard in manifest.shards], pa.list_(pa.int64())),
    }
    if manifest.kind == "videos":
        columns["videos"] = pa.array(
            [[asdict(video) for video in shard.videos] for shard in manifest.shards], _VIDEOS_TYPE
        )
    metadata = {"version": _VERSION, "classes": manifest.classes, "kind": manifest.kind}
    table = pa.table(columns).replace_schema_metadata({"bsq_ray": json.dumps(metadata)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(storage.join(manifest.url, MANIFEST_FILE), buffer.getvalue())
