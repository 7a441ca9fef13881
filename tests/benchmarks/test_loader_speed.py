"""Loading: images per second from the same shards to the same crops, beside webdataset's own loader; from S3 too."""

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
from bsq_ray.data.pack import pack_images
from bsq_ray.data.stream import training_batches

pytestmark = pytest.mark.benchmark
_COUNT, _CROP, _BATCH = 2000, 128, 32
_WARM_UP, _TIMED, _ROUNDS = 5000, 24000, 2
_TIMED_FROM_S3 = 6000


@pytest.fixture(scope="module", params=[256, 512], ids=lambda side: f"{side} px")
def shards(request, photos, tmp_path_factory):
    """2,000 JPEGs cut from real photographs, in eight shards."""
    side = request.param
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(_COUNT):
        photo = photos[number % len(photos)].resize((side + 60, side + 40))
        left, top = rng.integers(60), rng.integers(40)
        photo.crop((left, top, left + side, top + side)).save(folder / f"{number}.jpg", quality=90)
    total = sum(path.stat().st_size for path in folder.iterdir())
    url = str(tmp_path_factory.mktemp("shards"))
    pack_images(str(folder), url, shard_mb=total / 7.5e6, num_workers=0)
    return side, url


def measure_rate(batches, timed=_TIMED):
    """Images per second once all processes are up, over far more images than a loader reads ahead (4,000 at most)."""
    iterator = iter(batches)
    num_images = 0
    while num_images < _WARM_UP:
        num_images += len(next(iterator))
    num_images, began = 0, time.perf_counter()
    while num_images < timed:
        num_images += len(next(iterator))
    return num_images / (time.perf_counter() - began)


def bsq_ray_loader(manifest, executor):
    section = config.DataConfig()
    stream = training_batches(ImageSource(manifest, section, _CROP), section, _BATCH, 0, 1, seed=0, executor=executor)
    for batch in stream:
        yield batch.values_B


def webdataset_loader(manifest, processes):
    """The same tensors as its users make them, with Pillow."""

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


# The server first: Ray's workers take its address from the environment they are started in.
def test_loader_speed(shards, bucket, ray_local, record_measurement):
    side, url = shards
    storage.copy_folder(url, bucket)
    manifest, remote = read_manifest(url), read_manifest(bucket)
    loaders = {
        "webdataset, 2 processes": lambda: webdataset_loader(manifest, 2),
        "bsq_ray, threads of this process": lambda: bsq_ray_loader(manifest, "local"),
        "bsq_ray, Ray Data": lambda: bsq_ray_loader(manifest, "ray"),
    }
    # In turns, and each one's best: what else a machine has to do comes and goes.
    rounds = [{name: measure_rate(loader()) for name, loader in loaders.items()} for _ in range(_ROUNDS)]
    rows = {name: max(figures[name] for figures in rounds) for name in loaders}
    rows["bsq_ray, Ray Data, from S3 (a server on the same cores)"] = measure_rate(
        bsq_ray_loader(remote, "ray"), _TIMED_FROM_S3
    )
    webdataset_rate = rows["webdataset, 2 processes"]
    for name, value in rows.items():
        what = f"loader, {side} px JPEGs to {_CROP} px crops: {name}"
        record_measurement(what, f"{value:,.0f} images/s", f"{value / webdataset_rate:.2f} x webdataset")
