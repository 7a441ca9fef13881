"""Encode packed images or videos to a token table with a pool of actors: each shard becomes one part of the table.

    shards ─▶ actors: read, crop, Tokenizer.encode, pack bits ─▶ part-….parquet ─all parts exist─▶ tokens.json

Existing parts of the same tokenizer and data are kept, so an interrupted run resumes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from bsq_ray import config, model_folder, storage
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.factory import build_pixel_source
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.token_table import (
    TOKENIZER_FOLDER,
    TokenTable,
    TokenTableInfo,
    completed_parts,
    write_part,
    write_table,
)
from bsq_ray.data.transforms import to_float
from bsq_ray.models.quantizers.bits import pack_bits
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.device import default_device
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress
from bsq_ray.runtime.random_streams import RandomStream, stream_seed


@dataclass(frozen=True)
class TokenizeResult:
    """A complete table, the number of parts that this call wrote, and images or videos that could not be read."""

    table: TokenTable
    num_written: int
    skipped: list[str]


def tokenize(
    model_url: str,
    data_url: str,
    out_url: str,
    *,
    num_workers: int = 2,
    address: str | None = None,
    num_crops: int = 1,
    scale: float = 1.25,
    flip: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: ProgressCallback = no_progress,
) -> TokenizeResult:
    """Write a token table of packed images, or of the clips of packed videos.

    Args:
        model_url: model folder of the tokenizer; it is copied into the folder of the table.
        data_url: packed images or videos.
        out_url: folder of the table.
        num_workers: number of actors; 0 runs in this process, without Ray.
        address: Ray cluster; None starts a local one.
        num_crops: rows of each image: the center crop, then random crops. Random crops of a clip start at a random
            frame, too.
        scale: images are resized so that their short side is 1 to `scale` times a random crop.
        flip: mirror half of the random crops.
        batch_size: images or clips per forward pass.
        seed: seed of the random crops.
        on_progress: called with the number of finished parts and of all parts.

    Raises:
        ValueError: model or data are missing, or the folder has a table of another tokenizer.
    """
    # Actors may have another working folder.
    model_url, data_url, out_url = model_folder.absolute_url(model_url), *map(storage.absolute, (data_url, out_url))
    folder = model_folder.load_model_folder(model_url)
    run = config.require_stage(folder.config, config.TokenizerConfig, model_url)
    manifest = read_manifest(data_url)
    if num_crops < 1:
        raise ValueError(f"num_crops {num_crops} must be 1 or more")
    data_config = run.data.model_copy(update={"resize_range": (1.0, scale), "random_flip": flip})
    run = run.model_copy(update={"data": data_config})
    source = build_pixel_source(run, manifest)
    frames = run.model.frames if manifest.kind == "videos" else 1
    side = run.model.grid_size
    dataset = f"{manifest.hash} scale {scale:g} flip {flip} seed {seed}" if num_crops > 1 else manifest.hash
    if manifest.kind == "videos":
        dataset += f" stride {run.data.frame_stride} clips {run.data.clips_per_video}"
    info = TokenTableInfo(
        _bundle_tokenizer(folder, model_url, out_url),
        run.model.quantizer.bits,
        (frames, side, side),
        manifest.classes,
        num_crops,
        dataset,
        folder.tokens_id,
    )
    names = [f"part-{number:06}.parquet" for number in range(manifest.num_shards)]
    parts = completed_parts(out_url, names, info)
    missing = [number for number, name in enumerate(names) if name not in parts]
    task = _TokenizeTask(
        model_url, out_url, manifest, source, info, batch_size, stream_seed(RandomStream.TOKENIZER_CROP, seed)
    )
    skipped: list[str] = []
    results = actor_map_ordered(missing, partial(_PartWriter, task), num_workers, address)
    for number, result in zip(missing, results, strict=True):
        parts[names[number]] = (result.num_rows, result.digest)
        skipped += result.skipped
        on_progress(len(parts), len(names))
    table = TokenTable(out_url, info, tuple((name, *parts[name]) for name in names))
    write_table(table)
    return TokenizeResult(table, len(missing), skipped)


def _bundle_tokenizer(folder: model_folder.ModelFolder, model_url: str, out_url: str) -> str:
    """Copy the tokenizer into the table unless the table has one of the same tokens; return the id of the copy.

    Raises:
        ValueError: the table has a tokenizer of other tokens.
    """
    bundled_url = storage.join(out_url, TOKENIZER_FOLDER)
    if storage.exists(storage.join(bundled_url, "config.yaml")):
        bundled = model_folder.load_model_folder(bundled_url)
        if bundled.tokens_id != folder.tokens_id:
            raise ValueError(
                f"{out_url} has tokens of another tokenizer ({bundled.model_id[:12]}, {model_url} is "
                f"{folder.model_id[:12]}); choose another --out"
            )
        return bundled.model_id
    storage.copy_folder(model_url, bundled_url)
    return folder.model_id


@dataclass(frozen=True)
class _TokenizeTask:
    model_url: str
    out_url: str
    manifest: Manifest
    source: DataSource
    info: TokenTableInfo
    batch_size: int
    seed: int


@dataclass(frozen=True)
class _PartResult:
    """Rows of a part, the SHA-256 of its rows, and reports on images or videos that could not be read."""

    num_rows: int
    digest: str
    skipped: list[str]


class _PartWriter:
    def __init__(self, task: _TokenizeTask) -> None:
        self.task = task
        self.device = default_device()
        self.tokenizer = Tokenizer.from_pretrained(task.model_url).to(self.device)
        self.source = task.source

    def __call__(self, part: int) -> _PartResult:
        """Write the rows of a shard, view by view."""
        info, last = self.task.info, int(self.source.shard_sizes[: part + 1].sum())
        first = last - int(self.source.shard_sizes[part])
        chunks = [
            range(start, min(start + self.task.batch_size, last)) for start in range(first, last, self.task.batch_size)
        ]
        keys: list[list[str]] = [[] for _ in range(info.views)]
        labels: list[list[np.ndarray]] = [[np.empty(0, np.int64)] for _ in range(info.views)]
        packed: list[list[np.ndarray]] = [[np.empty((0, info.row_bytes), np.uint8)] for _ in range(info.views)]
        skipped: dict[str, None] = {}
        for blocks in _read_ahead(self._read_views, chunks):
            for view, block in enumerate(blocks):
                skipped.update(dict.fromkeys(block.skipped))
                if block.keys:
                    keys[view] += block.keys
                    labels[view].append(block.labels_P)
                    packed[view].append(self._encode(block.values_P))
        if skipped and not any(keys):
            raise RuntimeError(f"nothing in {self.task.manifest.shard_name(part)} can be read: {next(iter(skipped))}")
        views_P = np.repeat(np.arange(info.views), [len(view_keys) for view_keys in keys])
        labels_P, packed_PB = (np.concatenate([row for view in rows for row in view]) for rows in (labels, packed))
        all_keys = [key for view_keys in keys for key in view_keys]
        url = storage.join(self.task.out_url, f"part-{part:06}.parquet")
        digest = write_part(url, info, all_keys, labels_P, views_P, packed_PB)
        return _PartResult(len(all_keys), digest, list(skipped))

    def _encode(self, values_P: np.ndarray) -> np.ndarray:
        tokens = self.tokenizer.encode(to_float(torch.from_numpy(values_P).to(self.device)))
        return pack_bits(tokens.bits_BNL.flatten(1)).cpu().numpy()

    def _read_views(self, samples: range) -> list[SampleBlock]:
        num_views = self.task.info.views
        if isinstance(self.source, ImageSource):
            return self.source.read_views(samples, num_views, self.task.seed)
        # The views of a video are different clips of it.
        return [
            self.source.read_eval(samples),
            *(self._read_random_clips(samples, view) for view in range(1, num_views)),
        ]

    def _read_random_clips(self, samples: range, view: int) -> SampleBlock:
        # The number of a view takes the place of an epoch. Replacements of damaged videos are left out.
        block = self.source.read(np.asarray(samples), np.full(len(samples), view), self.task.seed)
        rows = [p for p, key in enumerate(block.keys) if self._is_clip_of(key, samples[p])]
        keys = [block.keys[p] for p in rows]
        return SampleBlock(block.values_P[rows], block.labels_P[rows], keys, block.skipped)

    def _is_clip_of(self, key: str, sample: int) -> bool:
        assert isinstance(self.source, ClipSource)
        shard, index, _ = self.source.locate(sample)
        return key.rpartition("@")[0] == shard.key(index)


def _read_ahead(
    read: Callable[[range], list[SampleBlock]], chunks: Sequence[range], num_ahead: int = 2
) -> Iterator[list[SampleBlock]]:
    """Yield the result of each chunk; threads read the next ones while the model computes."""
    with ThreadPoolExecutor(num_ahead, thread_name_prefix="read-ahead") as pool:
        remaining = iter(chunks)
        pending = deque(pool.submit(read, chunk) for chunk in islice(remaining, num_ahead))
        while pending:
            blocks = pending.popleft().result()
            pending.extend(pool.submit(read, chunk) for chunk in islice(remaining, 1))
            yield blocks
