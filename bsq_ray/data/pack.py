"""A folder of images to WebDataset shards and their manifest, in parallel.

    folder ─list, shuffle─▶ plan of shards ─one task each: decode, limit, write─▶ shard-000000.tar … ─▶ manifest.parquet

The manifest is written last, so an interrupted packing leaves no data set that looks whole.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from bsq_ray import storage
from bsq_ray.data.images import DECODE_ERRORS, decode_fault, to_rgb
from bsq_ray.data.manifest import MANIFEST, Manifest, Shard, write_manifest
from bsq_ray.session import ray_session

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ARCHIVE_BLOCK = 512


@dataclass(frozen=True)
class Source:
    """One file to pack: its URL, the key it gets, and its class."""

    url: str
    key: str
    label: int


@dataclass
class PackReport:
    """What became of a folder.

    Attributes:
        manifest: the data set.
        damaged: "file: reason" of each file that could not be decoded.
        ignored: number of files that are not images by their name.
    """

    manifest: Manifest
    damaged: list[str] = field(default_factory=list)
    ignored: int = 0


def pack_images(
    source: str,
    destination: str,
    shard_mb: float = 100.0,
    max_side: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    address: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Packs a folder of images, with class subfolders or without.

    The first folder level names the classes; without subfolders all images are of the class "all". Files that cannot be
    decoded are reported and listed in `damaged.txt` beside the shards; the rest is packed.

    Args:
        source, destination: folders, local or behind any fsspec URL.
        shard_mb: size of a shard, in millions of bytes.
        max_side: images with a longer side are shrunk to it (Lanczos); None keeps every image as it is.
        seed: of the shuffle over shards.
        workers: 0 packs in this process; otherwise through Ray, None with as many tasks as fit.
        address: the Ray cluster; None starts one on this machine.
        progress: called with the number of finished files and of all files.

    Raises:
        ValueError: the folder is missing, holds no images or none that can be decoded, or the destination is in use.
    """
    if storage.exists(storage.join(destination, MANIFEST)):
        raise ValueError(f"{destination} already holds a packed data set; choose another folder or remove it first")
    if shard_mb <= 0:
        raise ValueError(f"shard size {shard_mb} MB must be positive")
    if max_side is not None and max_side < 8:
        raise ValueError(f"longest side {max_side} is too small; use at least 8 pixels")
    plan, classes, ignored = _plan(source, shard_mb * 1e6, seed)
    total, done = sum(map(len, plan)), 0
    shards: list[Shard] = []
    damaged: list[str] = []
    for shard, faults, files in _run(plan, destination, max_side, workers, address):
        damaged += faults
        done += files
        progress(done, total)
        if shard is not None:
            shards.append(shard)
    if not shards:
        raise ValueError(f"none of the {total} images in {source} can be decoded; the first: {damaged[0]}")
    shards.sort(key=lambda shard: shard.name)
    if damaged:
        storage.write_bytes(storage.join(destination, "damaged.txt"), "\n".join(sorted(damaged)).encode() + b"\n")
    manifest = Manifest(destination, tuple(shards), classes)
    write_manifest(manifest)
    return PackReport(manifest, sorted(damaged), ignored)


def index_shards(url: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Writes the manifest of WebDataset shards that were made elsewhere: `{key}.jpg|png|webp…` with `{key}.cls`.

    Raises:
        ValueError: there are no tar files, or one is damaged or holds no images.
    """
    names = [name for name in storage.list_folder(url) if name.endswith(".tar")]
    if not names:
        raise ValueError(f"{url} holds no .tar shards to index")
    shards = []
    for number, name in enumerate(names, 1):
        shards.append(_index(name, storage.read_bytes(storage.join(url, name)), storage.join(url, name)))
        progress(number, len(names))
    labels = 1 + max(max(shard.labels) for shard in shards)
    manifest = Manifest(url, tuple(shards), tuple(str(label) for label in range(labels)))
    write_manifest(manifest)
    return manifest


def _plan(source: str, shard_bytes: float, seed: int) -> tuple[list[list[Source]], tuple[str, ...], int]:
    """Lists the folder and deals its images out to shards; also the class names and how many files are no images."""
    fs, root = storage.filesystem(source)
    with storage.explained(source, "read"):
        if not fs.isdir(root):
            raise ValueError(f"{source} is not a folder" if fs.exists(root) else f"{source} does not exist")
        files = {path: info["size"] or 0 for path, info in sorted(fs.find(root, detail=True).items())}
    images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise ValueError(f"{source} holds no images (looked for {', '.join(IMAGE_SUFFIXES)})")
    folders = [
        posixpath.relpath(path, root).split("/")[0] if "/" in posixpath.relpath(path, root) else "" for path in images
    ]
    classes = tuple(sorted(set(folders) - {""})) or ("all",)
    if "" in folders and classes != ("all",):
        raise ValueError(
            f"{source} holds images both in class folders ({classes[0]}, …) and outside of them "
            f"({posixpath.basename(images[folders.index('')])}, …); move them into class folders"
        )
    plan: list[list[Source]] = [[]]
    filled = 0
    for number in np.random.default_rng(seed).permutation(len(images)):
        path, label = images[number], classes.index(folders[number] or "all")
        if plan[-1] and filled + files[path] > shard_bytes:
            plan.append([])
            filled = 0
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", posixpath.splitext(posixpath.basename(path))[0])[:40]
        url = path if storage.is_local(source) else fs.unstrip_protocol(path)
        plan[-1].append(Source(url, f"{number:08d}_{slug}", label))
        filled += files[path]
    return plan, classes, len(files) - len(images)


def _run(
    plan: list[list[Source]], destination: str, max_side: int | None, workers: int | None, address: str | None
) -> Iterator[tuple[Shard | None, list[str], int]]:
    """Packs every shard of the plan, in this process or by Ray tasks, and yields each result as it is finished."""
    jobs = [(f"shard-{number:06d}.tar", sources, destination, max_side) for number, sources in enumerate(plan)]
    if workers == 0:
        for job in jobs:
            yield _pack_shard(*job)
        return
    with ray_session(address):
        import ray

        at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1)(_pack_shard)
        waiting = list(reversed(jobs))
        running = [task.remote(*waiting.pop()) for _ in range(min(at_once, len(jobs)))]
        while running:
            [ready], running = ray.wait(running, num_returns=1)
            if waiting:
                running.append(task.remote(*waiting.pop()))
            yield ray.get(ready)


def _pack_shard(
    name: str, sources: list[Source], destination: str, max_side: int | None
) -> tuple[Shard | None, list[str], int]:
    """Writes one shard; None if nothing in it could be decoded. Also the damaged files and how many were handled."""
    archive = io.BytesIO()
    keys, labels, offsets, sizes, damaged = [], [], [], [], []
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for source in sources:
            try:
                data, suffix = _prepared(storage.read_bytes(source.url), max_side)
            except DECODE_ERRORS as error:
                damaged.append(f"{source.url}: {decode_fault(error)}")
                continue
            offsets.append(archive.tell() + _ARCHIVE_BLOCK)
            _add(tar, f"{source.key}.{suffix}", data)
            _add(tar, f"{source.key}.cls", str(source.label).encode())
            keys.append(source.key)
            labels.append(source.label)
            sizes.append(len(data))
    if not keys:
        return None, damaged, len(sources)
    content = archive.getvalue()
    storage.write_bytes(storage.join(destination, name), content)
    digest = hashlib.sha256(content).hexdigest()
    shard = Shard(name, len(content), digest, tuple(keys), tuple(labels), tuple(offsets), tuple(sizes))
    return shard, damaged, len(sources)


def _prepared(data: bytes, max_side: int | None) -> tuple[bytes, str]:
    """The bytes to store and their suffix: the file as it is if it is plain RGB or grey, upright and small enough."""
    image = Image.open(io.BytesIO(data))
    image_format, mode, turned = image.format, image.mode, image.getexif().get(0x0112, 1) != 1
    opaque = mode in ("RGB", "L") and "transparency" not in image.info
    rgb = to_rgb(image)
    too_large = max_side is not None and max(rgb.size) > max_side
    if image_format in _SUFFIX_OF_FORMAT and opaque and not turned and not too_large:
        return data, _SUFFIX_OF_FORMAT[image_format]
    if max_side is not None and too_large:
        scale = max_side / max(rgb.size)
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    if image_format == "JPEG":
        rgb.save(stored, "JPEG", quality=95, subsampling=0)
        return stored.getvalue(), "jpg"
    rgb.save(stored, "PNG")
    return stored.getvalue(), "png"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _index(name: str, content: bytes, url: str) -> Shard:
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                key, _, suffix = posixpath.basename(member.name).partition(".")
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    classes[key] = int(content[member.offset_data : member.offset_data + member.size])
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{url} is damaged: {error}") from error
    if not images:
        raise ValueError(f"{url} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    keys = tuple(images)
    return Shard(
        name,
        len(content),
        hashlib.sha256(content).hexdigest(),
        keys,
        tuple(classes.get(key, 0) for key in keys),
        tuple(images[key][0] for key in keys),
        tuple(images[key][1] for key in keys),
    )
