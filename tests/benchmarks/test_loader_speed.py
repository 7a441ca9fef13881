"""Throughput of loaders from the same shards to the same crops, compared with webdataset's loader; also from S3."""

import random
import time

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from bsq_ray import config, storage
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.stream import training_batches

pytestmark = pytest.mark.benchmark
_COUNT, _CROP, _BATCH = 2000, 128, 32
_WARM_UP, _TIMED, _ROUNDS = 5000, 24000, 2
_TIMED_FROM_S3 = 6000


@pytest.fixture(scope="module", params=[256, 512], ids=lambda side: f"{side} px")
def shards(request, photos, tmp_path_factory):
    """Return the side and the URL of 2,000 JPEGs, crops of real photos, in eight shards."""
    side = request.param
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(_COUNT):
        photo = photos[number % len(photos)].resize((side + 60, side + 40))
        left, top = rng.integers(60), rng.integers(40)
        photo.crop((left, top, left + side, top + side)).save(folder / f"{number}.jpg", quality=90)
    total = sum(path.stat().st_size for path in folder.iterdir())
    url = str(tmp_path_factory.mktemp("shards"))
    pack_images(str(folder), url, PackOptions(shard_mb=total / 7.5e6, num_workers=0))
    return side, url


def measure_rate(batches, timed=_TIMED):
    """Return the images per second in steady state, over many more images than a loader prefetches (at most 4,000)."""
    iterator = iter(batches)
    num_images = 0
    while num_images < _WARM_UP:
        num_images += len(next(iterator))
    num_images, start = 0, time.perf_counter()
    while num_images < timed:
        num_images += len(next(iterator))
    return num_images / (time.perf_counter() - start)


def bsq_ray_loader(manifest, executor):
    data_config = config.DataConfig()
    stream = training_batches(
        ImageSource(manifest, data_config, _CROP),
        data_config,
        batch_size=_BATCH,
        rank=0,
        world_size=1,
        seed=0,
        executor=executor,
    )
    for batch in stream:
        yield batch.values_B


def webdataset_loader(manifest, processes):
    """Return webdataset's loader of the same tensors, decoded and cropped with Pillow."""

    def crop(sample):
        image = sample["jpg"].convert("RGB")
        factor = _CROP / min(image.size)
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BILINEAR)
        left, top = random.randint(0, image.width - _CROP), random.randint(0, image.height - _CROP)
        pixels_HWC = np.array(image.crop((left, top, left + _CROP, top + _CROP)))
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()

    urls = [f"{manifest.url}/{shard.name}" for shard in manifest.shards]
    data = webdataset.WebDataset(urls, shardshuffle=False, resampled=True).decode("pil").map(crop)
    return webdataset.WebLoader(data.batched(_BATCH, collation_fn=torch.stack), batch_size=None, num_workers=processes)


# The `bucket` fixture comes first: Ray's workers read the server's address from the environment at their start.
def test_loader_speed(shards, bucket, ray_local, record):
    side, url = shards
    storage.copy_folder(url, bucket)
    manifest, remote = read_manifest(url), read_manifest(bucket)
    loaders = {
        "webdataset": lambda: webdataset_loader(manifest, 2),
        "threads": lambda: bsq_ray_loader(manifest, "local"),
        "ray-data": lambda: bsq_ray_loader(manifest, "ray"),
    }
    # Loaders alternate and the best round counts, because the load of a shared node changes.
    rounds = [{name: measure_rate(loader()) for name, loader in loaders.items()} for _ in range(_ROUNDS)]
    rows = {name: max(rates[name] for rates in rounds) for name in loaders}
    rows["s3"] = measure_rate(bsq_ray_loader(remote, "ray"), _TIMED_FROM_S3)
    for row_id, rate in rows.items():
        values = {f"images_per_s_{side}": round(rate), f"ratio_{side}": rate / rows["webdataset"]}
        record("loader-cpu", row_id, **values)
