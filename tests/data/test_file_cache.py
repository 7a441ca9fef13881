"""Local copies of remote shards: one request each, bounded, and safe with many processes and crashes."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import aiobotocore.client
import pytest

from bsq_ray import config, storage
from bsq_ray.data import file_cache
from bsq_ray.data.file_cache import FileCache
from bsq_ray.data.image_source import ImageSource
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.shard_reader import fetch_encoded
from bsq_ray.data.stream import training_batches


def read_all(path):
    return Path(path).read_bytes()


@pytest.fixture
def remote(tmp_path):
    """A function that creates a remote file of a size and returns its URL."""

    def create(name, size):
        url = f"memory://file-cache/{tmp_path.name}/{name}"
        storage.write_bytes(url, name.encode() * size)
        return url

    return create


@pytest.fixture
def downloads(monkeypatch):
    """URLs in the order of their downloads."""
    urls, download = [], storage.download

    def record(url, path):
        urls.append(url)
        download(url, path)

    monkeypatch.setattr(storage, "download", record)
    return urls


def copies(folder):
    return sorted(path.stat().st_size for path in folder.glob("*.copy"))


def test_open_downloads_each_version_once(remote, downloads, tmp_path):
    """A file is downloaded once, by however many threads; another version is another copy."""
    cache, url = FileCache(str(tmp_path / "cache"), 1000), remote("a", 100)
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda _: cache.open(url, "v1", 100, read_all), range(16)))
    assert contents == [b"a" * 100] * 16
    assert downloads == [url]
    assert cache.open(url, "v2", 100, read_all) == b"a" * 100
    assert downloads == [url, url]


def test_open_evicts_the_least_recently_used(remote, downloads, tmp_path):
    """Copies never exceed the size of the cache; a file that was used lately stays."""
    cache = FileCache(str(tmp_path / "cache"), 250)
    urls = [remote(name, 100) for name in "abc"]
    for url in (*urls[:2], urls[0], urls[2], urls[0]):
        cache.open(url, "", 100, read_all)
        assert sum(copies(tmp_path / "cache")) <= 250
    assert downloads == urls


def test_open_keeps_open_files_readable_after_eviction(remote, tmp_path):
    """A file that is being read stays readable when its copy is removed."""
    cache = FileCache(str(tmp_path / "cache"), 100)
    with cache.open(remote("a", 100), "", 100, lambda path: open(path, "rb")) as file:
        cache.open(remote("b", 100), "", 100, read_all)
        assert copies(tmp_path / "cache") == [100]
        assert file.read() == b"a" * 100


def test_open_wrong_size_raises_and_leaves_nothing(remote, tmp_path):
    """A file of another size than the manifest's is rejected."""
    with pytest.raises(ValueError, match=r"/a has 100 bytes, but the manifest requires 90"):
        FileCache(str(tmp_path / "cache"), 1000).open(remote("a", 100), "", 90, read_all)
    assert not list((tmp_path / "cache").glob("*.*"))


def test_fetch_with_full_disk_reads_byte_ranges(photo_folders, bucket, tmp_path, monkeypatch):
    """A cache folder that cannot be written is no reason to stop: samples are read by byte ranges."""
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way of the folder of indexes")
    manifest = pack_images(str(photo_folders[1]), f"{bucket}/set", PackOptions(max_side=64, num_workers=0)).manifest
    expected = fetch_encoded(manifest, range(3))
    monkeypatch.setattr(file_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert fetch_encoded(manifest, range(3), cache=FileCache(str(tmp_path / "cache"), 10**9)) == expected
    assert all(isinstance(blob, bytes) for blob in expected)
    assert copies(tmp_path / "cache") == []


def crash_during_download(url, folder):
    """End the process in the middle of a download."""

    def half(url, path):
        Path(path).write_bytes(b"a" * 50)
        os._exit(1)

    storage.download = half
    FileCache(folder, 1000).open(url, "", 100, read_all)


def test_open_recovers_after_a_crashed_download(remote, tmp_path):
    """A process that died during a download blocks no one, and its partial file is removed."""
    url, folder = remote("a", 100), str(tmp_path / "cache")
    process = multiprocessing.get_context("fork").Process(target=crash_during_download, args=(url, folder))
    process.start()
    process.join(30)
    [partial] = (tmp_path / "cache").glob("*.partial")
    assert partial.stat().st_size == 50
    FileCache(folder, 1000).open(remote("b", 100), "", 100, read_all)
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert FileCache(folder, 1000).open(url, "", 100, read_all) == b"a" * 100


def read_repeatedly(folder, urls, results):
    storage.download = lambda url, path: Path(path).write_bytes(url.encode() * 10)
    cache = FileCache(folder, 250)
    results.put(all(cache.open(url, "", 100, read_all) == url.encode() * 10 for _ in range(20) for url in urls))


def test_open_many_processes_share_a_small_cache(tmp_path):
    """Processes that evict each other's copies all read the right content."""
    context = multiprocessing.get_context("fork")
    results, urls = context.Queue(), [f"file-{n:05}" for n in range(6)]
    arguments = [(str(tmp_path), urls[n:] + urls[:n], results) for n in range(4)]
    processes = [context.Process(target=read_repeatedly, args=each) for each in arguments]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 4
    assert sum(copies(tmp_path)) <= 250


@pytest.fixture
def get_requests(monkeypatch):
    """Keys of the GET requests of this process."""
    keys, call = [], aiobotocore.client.AioBaseClient._make_api_call

    async def record(self, operation, parameters):
        if operation == "GetObject":
            keys.append(parameters["Key"])
        return await call(self, operation, parameters)

    monkeypatch.setattr(aiobotocore.client.AioBaseClient, "_make_api_call", record)
    return keys


def test_training_batches_with_cache_get_each_shard_once(photo_folders, bucket, tmp_path, monkeypatch, get_requests):
    """With a cache, several epochs of several workers read each shard with one request; without, one per sample."""
    monkeypatch.setenv("BSQ_RAY_CACHE", str(tmp_path / "bsq_ray"))
    pack_images(str(photo_folders[1]), f"{bucket}/set", PackOptions(max_side=64, shard_mb=0.02, num_workers=0))
    manifest = read_manifest(f"{bucket}/set")

    def read(cache):
        get_requests.clear()
        data_config = config.DataConfig(interleave=2, cache=cache)
        for rank in range(2):
            source = ImageSource(manifest, data_config, 32)
            stream = training_batches(source, data_config, batch_size=4, rank=rank, world_size=2, seed=0)
            yield [next(stream).values_B.numpy().tobytes() for _ in range(manifest.num_samples)]
            stream.close()

    cached = list(read(config.ShardCacheConfig(folder=str(tmp_path / "shards"))))
    shards = [key for key in get_requests if key.endswith(".tar")]
    assert len(shards) == len(set(shards)) == manifest.num_shards > 1
    assert list(read(config.ShardCacheConfig())) == cached
    assert len([key for key in get_requests if key.endswith(".tar")]) >= 2 * 2 * manifest.num_samples
