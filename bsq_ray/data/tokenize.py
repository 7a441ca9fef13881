"""Encode packed images or videos to a token table with a pool of actors: each shard becomes one part of the table.

    shards ─▶ actors: read, crop, Tokenizer.encode, pack bits ─▶ part-….parquet ─all parts exist─▶ tokens.json

Existing parts of the same tokenizer and data are kept, so an interrupted run resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bsq_ray import config, model_folder, storage
from bsq_ray.data.clip_source import ClipSource
from bsq_ray.data.data_source import DataSource, SampleBlock
from bsq_ray.data.factory import build_pixel_source
from bsq_ray.data.manifest import Manifest, read_manifest
from bsq_ray.data.token_table import (
    TOKENIZER_FOLDER,
    TokenTable,
    TokenTableInfo,
    completed_part,
    write_part,
    write_table,
)
from bsq_ray.data.transforms import to_float
from bsq_ray.models.quantizers.bits import pack_bits
from bsq_ray.models.tokenizer import Tokenizer
from bsq_ray.runtime.actor_pool import actor_map_ordered
from bsq_ray.runtime.device import default_device
from bsq_ray.runtime.progress_callback import ProgressCallback, no_progress


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
        folder.model_id, run.model.quantizer.bits, (frames, side, side), manifest.classes, num_crops, dataset
    )
    _bundle_tokenizer(folder.model_id, model_url, out_url)
    names = [f"part-{number:06}.parquet" for number in range(manifest.num_shards)]
    missing = [n for n, name in enumerate(names) if completed_part(storage.join(out_url, name), info) is None]
    task = _TokenizeTask(model_url, out_url, manifest, source, info, batch_size, seed)
    skipped: list[str] = []
    results = actor_map_ordered(missing, partial(_PartWriter, task), num_workers, address)
    for done, part_skipped in enumerate(results, len(names) - len(missing) + 1):
        skipped += part_skipped
        on_progress(done, len(names))
    parts = []
    for name in names:
        part = completed_part(storage.join(out_url, name), info)
        if part is None:
            raise RuntimeError(f"{storage.join(out_url, name)} was written but cannot be read again")
        parts.append((name, *part))
    table = TokenTable(out_url, info, tuple(parts))
    write_table(table)
    return TokenizeResult(table, len(missing), skipped)


def _bundle_tokenizer(model_id: str, model_url: str, out_url: str) -> None:
    bundled_url = storage.join(out_url, TOKENIZER_FOLDER)
    if storage.exists(storage.join(bundled_url, "config.yaml")):
        bundled_id = model_folder.load_model_folder(bundled_url).model_id
        if bundled_id != model_id:
            raise ValueError(
                f"{out_url} has tokens of another tokenizer ({bundled_id[:12]}, {model_url} is {model_id[:12]}); "
                "choose another --out"
            )
    else:
        storage.copy_folder(model_url, bundled_url)


@dataclass(frozen=True)
class _TokenizeTask:
    model_url: str
    out_url: str
    manifest: Manifest
    source: DataSource
    info: TokenTableInfo
    batch_size: int
    seed: int


class _PartWriter:
    def __init__(self, task: _TokenizeTask) -> None:
        self.task = task
        self.device = default_device()
        self.tokenizer = Tokenizer.from_pretrained(task.model_url).to(self.device)
        self.source = task.source

    def __call__(self, part: int) -> list[str]:
        """Write a part; return reports on the images or videos of its shard that could not be read."""
        last = int(self.source.shard_sizes[: part + 1].sum())
        first = last - int(self.source.shard_sizes[part])
        keys: list[str] = []
        skipped: list[str] = []
        packed = [np.empty((0, self.task.info.row_bytes), np.uint8)]
        labels, views = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for view in range(self.task.info.views):
            for start in range(first, last, self.task.batch_size):
                samples = self._read(range(start, min(start + self.task.batch_size, last)), view)
                skipped += [line for line in samples.skipped if line not in skipped]
                if not samples.keys:
                    continue
                tokens = self.tokenizer.encode(to_float(torch.from_numpy(samples.values_P).to(self.device)))
                packed.append(pack_bits(tokens.bits_BNL.flatten(1)).cpu().numpy())
                labels.append(samples.labels_P)
                views.append(np.full(len(samples.keys), view))
                keys += samples.keys
        if skipped and not keys:
            raise RuntimeError(f"nothing in {self.task.manifest.shard_name(part)} can be read: {skipped[0]}")
        url = storage.join(self.task.out_url, f"part-{part:06}.parquet")
        columns = (np.concatenate(labels), np.concatenate(views), np.concatenate(packed))
        write_part(url, self.task.info, keys, *columns)
        return skipped

    def _read(self, samples: range, view: int) -> SampleBlock:
        if view == 0:
            return self.source.read_eval(samples)
        # Each crop number takes the place of an epoch. Replacements of damaged samples are left out.
        block = self.source.read(np.asarray(samples), np.full(len(samples), view), self.task.seed)
        rows = [p for p, key in enumerate(block.keys) if self._matches(key, samples[p])]
        keys = [block.keys[p] for p in rows]
        return SampleBlock(block.values_P[rows], block.labels_P[rows], keys, block.skipped)

    def _matches(self, key: str, sample: int) -> bool:
        """Return True if the key is that of this image, or of a clip of this video."""
        if isinstance(self.source, ClipSource):
            shard, index, _ = self.source.locate(sample)
            return key.rpartition("@")[0] == shard.key(index)
        shard, index = self.task.manifest.locate(sample)
        return key == shard.key(index)
