"""The manifest of WebDataset shards that were made elsewhere."""

from __future__ import annotations

import hashlib
import io
import posixpath
import tarfile
from collections.abc import Callable

from bsq_ray import storage
from bsq_ray.data.manifest import Manifest, Shard, write_manifest
from bsq_ray.data.transforms import IMAGE_SUFFIXES
from bsq_ray.media.video_reader import VIDEO_SUFFIXES, probe


def index_shards(url: str, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Writes the manifest of shards with `{key}.jpg|png|webp…` or `{key}.mp4|avi|…`, each with `{key}.cls`.

    Without any `.cls` all samples are of one class.

    Raises:
        ValueError: there are no tar files, or one is damaged, holds neither images nor videos, a video is damaged, or
            only some samples have a class.
    """
    names = [name for name in storage.list_folder(url) if name.endswith(".tar")]
    if not names:
        raise ValueError(f"{url} holds no .tar shards to index")
    shards, unlabeled = [], []
    for number, name in enumerate(names, 1):
        shard, shard_unlabeled = _index_shard(
            name, storage.read_bytes(storage.join(url, name)), storage.join(url, name)
        )
        shards.append(shard)
        unlabeled += [f"{name}: {key}" for key in shard_unlabeled]
        on_progress(number, len(names))
    num_samples = sum(len(shard.keys) for shard in shards)
    if 0 < len(unlabeled) < num_samples:
        raise ValueError(
            f"{len(unlabeled)} of {num_samples} samples in {url} have no class, such as {unlabeled[0]}; give each a .cls, or "
            "none of them"
        )
    num_classes = 1 + max(max(shard.labels) for shard in shards)
    kinds = {"videos" if shard.videos else "images": shard.name for shard in shards}
    if len(kinds) > 1:
        raise ValueError(f"{url} holds images ({kinds['images']}) and videos ({kinds['videos']}); index them apart")
    manifest = Manifest(url, tuple(shards), tuple(str(label) for label in range(num_classes)), next(iter(kinds)))
    write_manifest(manifest)
    return manifest


def _index_shard(name: str, content: bytes, url: str) -> tuple[Shard, list[str]]:
    """What a shard holds, and the keys of samples without a class."""
    spans: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    suffixes: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                # Files of one name in two folders are two samples.
                folder, name_inside = posixpath.split(member.name)
                stem, _, suffix = name_inside.partition(".")
                key = posixpath.join(folder, stem)
                if f".{suffix.lower()}" in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
                    spans[key] = (member.offset_data, member.size)
                    suffixes.add(f".{suffix.lower()}")
                elif suffix == "cls":
                    classes[key] = int(content[member.offset_data : member.offset_data + member.size])
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{url} is damaged: {error}") from error
    if any(label < 0 for label in classes.values()):
        raise ValueError(f"{url} has the class {min(classes.values())}; classes are numbers from 0")
    if not spans:
        raise ValueError(
            f"{url} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no videos ({', '.join(VIDEO_SUFFIXES)})"
        )
    videos = []
    if not suffixes.isdisjoint(VIDEO_SUFFIXES):
        if not suffixes.isdisjoint(IMAGE_SUFFIXES):
            raise ValueError(f"{url} holds images and videos ({', '.join(sorted(suffixes))}); a data set has one kind")
        for key, (offset, size) in spans.items():
            try:
                videos.append(probe(io.BytesIO(content[offset : offset + size])).video)
            except ValueError as error:
                raise ValueError(f"{url}: {key} {error}; take it out of the shard, or pack the videos again") from error
    keys = tuple(spans)
    shard = Shard(
        name,
        len(content),
        hashlib.sha256(content).hexdigest(),
        keys,
        tuple(classes.get(key, 0) for key in keys),
        tuple(spans[key][0] for key in keys),
        tuple(spans[key][1] for key in keys),
        tuple(videos),
    )
    return shard, [key for key in keys if key not in classes]
