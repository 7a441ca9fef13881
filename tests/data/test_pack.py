"""Packing folders, indexing and inspecting shards, and reading them back."""

import io
import re
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
import webdataset
from PIL import Image
from small_images import damaged_avif, encode, tiff

from bsq_ray import storage
from bsq_ray.data import inspect
from bsq_ray.data.index import index_shards
from bsq_ray.data.inspect import inspect_shards
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.packing import describe_packing
from bsq_ray.data.shard_reader import fetch_encoded


@pytest.fixture
def folder(tmp_path, photos):
    """Two classes, three photos each."""
    for number, photo in enumerate(photos[:6]):
        path = tmp_path / "photos" / ("cats" if number < 3 else "dogs") / f"photo.{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path)
    return tmp_path / "photos"


def test_pack_images_stores_every_image_with_its_class(folder, tmp_path):
    """Every image is in a shard with the label of its class folder."""
    report = pack_images(str(folder), str(tmp_path / "out"), PackOptions(shard_mb=0.08, num_workers=0))
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest == report.manifest
    assert manifest.num_samples == 6
    assert len(manifest.shards) > 1
    assert manifest.classes == ("cats", "dogs")
    labels = {key: label for shard in manifest.shards for key, label in zip(shard.keys, shard.labels, strict=True)}
    assert sorted(labels.values()) == [0, 0, 0, 1, 1, 1]
    assert not any("." in key for key in labels)
    originals = {path.read_bytes() for path in folder.rglob("*.jpg")}
    assert set(fetch_encoded(manifest, range(6))) == originals


def test_pack_images_writes_webdataset_shards(folder, tmp_path):
    """The `webdataset` package can read the shards."""
    pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    samples = list(webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False))
    assert len(samples) == 6
    assert all({"jpg", "cls"} <= sample.keys() for sample in samples)


def test_pack_images_with_ray_gives_identical_shards(folder, tmp_path, ray_local):
    """Packing with Ray gives the same shards as packing in this process."""
    here = pack_images(str(folder), str(tmp_path / "here"), PackOptions(shard_mb=0.08, num_workers=0))
    there = pack_images(str(folder), str(tmp_path / "there"), PackOptions(shard_mb=0.08))
    assert there.manifest.shards == here.manifest.shards


def test_pack_images_max_side_limits_longer_side(folder, tmp_path):
    """`max_side` limits the longer side of every image."""
    report = pack_images(str(folder), str(tmp_path / "out"), PackOptions(max_side=100, num_workers=0))
    sizes = [Image.open(io.BytesIO(blob)).size for blob in fetch_encoded(report.manifest, range(6))]
    assert {max(size) for size in sizes} == {100}


def test_pack_images_lists_images_that_cannot_be_read(folder, photos, tmp_path):
    """Damaged files and animations are listed with their reason; all others are packed."""
    unreadable = {
        "coded.avif": (damaged_avif(photos[0]), "."),
        "short.jpg": (encode(photos[0], "JPEG")[:500], "[Tt]runcated"),
        "moving.gif": (encode(photos[0], "GIF", save_all=True, append_images=[photos[1]]), "it is an animation"),
        "text.png": (b"text", "not an image of a known format"),
        "negative.tif": (tiff(np.array([[-1, 0]], np.float32)), "its values reach from -1 to 0"),
    }
    for name, (data, _) in unreadable.items():
        (folder / "cats" / name).write_bytes(data)
    report = pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    assert report.manifest.num_samples == 6
    assert len(report.damaged_files) == len(unreadable)
    for line, (name, (_, reason)) in zip(report.damaged_files, sorted(unreadable.items()), strict=True):
        assert re.search(f"{name}: .*{reason}", line)


@pytest.mark.parametrize("max_side", [None, 100])
def test_pack_images_records_its_settings(folder, tmp_path, max_side):
    """The manifest records how files were changed, and shards of another program have no such record."""
    pack_images(str(folder), str(tmp_path / "out"), PackOptions(max_side=max_side, num_workers=0))
    packing = read_manifest(str(tmp_path / "out")).packing
    assert packing is not None
    assert (packing.max_side, packing.resize_filter) == (max_side, "lanczos")
    assert ("at most 100 px" in packing.describe()) == (max_side == 100)
    index_shards(str(tmp_path / "out"))
    assert describe_packing(read_manifest(str(tmp_path / "out")).packing) == "shards of another program"


def test_pack_images_lists_near_duplicates(folder, photos, tmp_path):
    """Photos of another data set in another size, and copies within a set, are listed."""
    pack_images(str(folder), str(tmp_path / "train"), PackOptions(num_workers=0))
    held_out = tmp_path / "held-out photos"
    held_out.mkdir()
    photos[2].resize((photos[2].width // 2, photos[2].height // 2)).save(held_out / "small.jpg")
    photos[7].save(held_out / "new.png")
    (held_out / "damaged.jpg").write_bytes(b"no image")
    train = str(tmp_path / "train")
    report = pack_images(str(held_out), str(tmp_path / "out"), PackOptions(num_workers=0, near_duplicates_of=train))
    [line] = report.near_duplicates
    assert re.fullmatch(rf"\d+_small: like \d+_photo_2 of {train} \((?:0\.99\d|1\.000)\)", line)
    assert (tmp_path / "out" / "near-duplicates.txt").read_text() == f"{line}\n"
    photos[7].resize((300, 200)).save(held_out / "again.png")
    within = str(tmp_path / "within")
    report = pack_images(str(held_out), within, PackOptions(num_workers=0, near_duplicates_of=within))
    [line] = report.near_duplicates
    assert {"again", "new"} == set(re.findall(r"again|new", line))
    with pytest.raises(ValueError, match="is not a packed data set"):
        pack_images(str(folder), str(tmp_path / "x"), PackOptions(num_workers=0, near_duplicates_of=str(held_out)))


def test_pack_images_undecodable_files_are_reported(folder, tmp_path):
    """Files that cannot be decoded are listed in `damaged.txt`, and all others are packed."""
    (folder / "cats" / "text.jpg").write_text("no image at all")
    whole = (folder / "dogs" / "photo.3.jpg").read_bytes()
    (folder / "dogs" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not counted as damaged")
    report = pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    assert report.manifest.num_samples == 6
    assert report.ignored.other_suffixes == {".txt": 1}
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in report.damaged_files] == ["text.jpg", "half.jpg"]
    assert "text.jpg" in (tmp_path / "out" / "damaged.txt").read_text()


def test_pack_images_flat_folder_has_one_class(photos, tmp_path):
    """A folder without class subfolders has the single class "all"."""
    photos[0].save(tmp_path / "a.png")
    assert pack_images(str(tmp_path), str(tmp_path / "out"), PackOptions(num_workers=0)).manifest.classes == ("all",)


def test_pack_images_to_object_store_reads_back(folder, bucket):
    """Images packed into an object store read back unchanged."""
    report = pack_images(str(folder), f"{bucket}/set", PackOptions(num_workers=0))
    manifest = read_manifest(f"{bucket}/set")
    assert manifest == report.manifest
    assert set(fetch_encoded(manifest, range(6))) == {path.read_bytes() for path in folder.rglob("*.jpg")}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: f / "missing", "does not exist"),
        (lambda f: (f / "empty").mkdir() or f / "empty", "contains no images"),
        (lambda f: (f / "file.txt").write_text("x") and f / "file.txt", "is not a folder"),
        (lambda f: (f / "text.jpg").write_text("x") and f, r"none of the 1 images in .* can be decoded"),
    ],
)
def test_pack_images_invalid_source_raises(tmp_path, prepare, message):
    """An invalid source folder raises an error that names the reason."""
    with pytest.raises(ValueError, match=message):
        pack_images(str(prepare(tmp_path)), str(tmp_path / "out"), PackOptions(num_workers=0))
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_pack_images_existing_data_set_raises(folder, tmp_path):
    """An existing data set is never overwritten."""
    pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    with pytest.raises(ValueError, match="already has a packed data set"):
        pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))


def test_pack_images_outside_class_folders_raises(folder, photos, tmp_path):
    """Images next to class folders raise an error."""
    photos[0].save(folder / "stray.png")
    with pytest.raises(ValueError, match="both in class folders"):
        pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))


def test_read_manifest_missing_or_invalid_raises(tmp_path):
    """A folder without a valid manifest raises an error that names it."""
    with pytest.raises(ValueError, match="is not a packed data set: it has no manifest"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1\x00\x01\xff nonsense")
    with pytest.raises(ValueError, match="damaged or not a manifest"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda table: table.drop_columns(["sha256"]), "damaged or not a manifest of bsq_ray: it has no column sha256"),
        (lambda table: table.replace_schema_metadata({"bsq_ray": "[]"}), "damaged or not a manifest"),
        (lambda table: table.replace_schema_metadata({"bsq_ray": "{}"}), "damaged or not a manifest"),
        (lambda table: table.replace_schema_metadata({"other": "{}"}), "damaged or not a manifest"),
        (
            lambda table: table.replace_schema_metadata({"bsq_ray": '{"version": 9}'}),
            "newer version",
        ),
        (
            lambda table: table.replace_schema_metadata({"bsq_ray": '{"version": 1}'}),
            "older version of bsq_ray; run `bsq-ray data index",
        ),
    ],
)
def test_read_manifest_damaged_raises(folder, tmp_path, damage, message):
    """A damaged or newer manifest raises an error that names the file."""
    pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    path = tmp_path / "out" / "manifest.parquet"
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(ValueError, match=f"manifest.parquet .*{message}"):
        read_manifest(str(tmp_path / "out"))


def test_index_shards_indexes_external_shards(photos, tmp_path):
    """Shards written by another program can be indexed and read."""
    with webdataset.TarWriter(str(tmp_path / "other-0.tar")) as writer:
        for number, photo in enumerate(photos[:3]):
            writer.write({"__key__": f"n{number}", "jpg": photo, "cls": number})
    manifest = index_shards(str(tmp_path)).manifest
    assert manifest.num_samples == 3
    assert manifest.shards[0].labels == (0, 1, 2)
    assert all(Image.open(io.BytesIO(blob)).size for blob in fetch_encoded(manifest, range(3)))
    with pytest.raises(ValueError, match=r"no \.tar shards"):
        index_shards(str(tmp_path / "nothing"))


def test_index_shards_partly_unlabeled_raises(photos, tmp_path):
    """Samples without a class among labeled ones raise an error; without any label all have one class."""

    def shard(name, *labels):
        tmp_path.joinpath(name).mkdir(exist_ok=True)
        with webdataset.TarWriter(str(tmp_path / name / f"other-{len(labels)}.tar")) as writer:
            for number, label in enumerate(labels):
                class_entry = {} if label is None else {"cls": label}
                writer.write({"__key__": f"n{number}", "jpg": photos[number].resize((32, 32)), **class_entry})
        return str(tmp_path / name)

    with pytest.raises(
        ValueError, match=r"1 of 3 samples in .*mixed have no class, such as other-3.tar: n1; give each"
    ):
        index_shards(shard("mixed", 1, None, 0))
    shard("apart", 1)
    with pytest.raises(ValueError, match="2 of 3 samples in .*apart have no class, such as other-2.tar: n0"):
        index_shards(shard("apart", None, None))
    with pytest.raises(ValueError, match=r"other-1.tar: n0.cls has the class -1; classes are numbers from 0"):
        index_shards(shard("negative", -1))
    assert index_shards(shard("without", None, None)).manifest.classes == ("0",)


def test_index_shards_keeps_folders_in_keys(photos, tmp_path):
    """Files with one name in two folders of a shard are two samples."""
    with webdataset.TarWriter(str(tmp_path / "other-0.tar")) as writer:
        for number, photo in enumerate(photos[:2]):
            writer.write({"__key__": f"class{number}/same", "jpg": photo, "cls": number})
    [shard] = index_shards(str(tmp_path)).manifest.shards
    assert shard.keys == ("class0/same", "class1/same")
    assert shard.labels == (0, 1)


def test_pack_images_storage_error_leaves_no_manifest(folder, tmp_path, monkeypatch):
    """A storage error stops packing, and no manifest is written."""
    read = storage.read_bytes

    def failing(url):
        if url.endswith("photo.4.jpg"):
            raise storage.StorageUnavailableError(f"cannot read {url}: no answer")
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", failing)
    with pytest.raises(storage.StorageUnavailableError, match=r"photo\.4\.jpg: no answer"):
        pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0, storage_timeout_s=0))
    assert not (tmp_path / "out" / "manifest.parquet").exists()


def test_pack_images_split_list_of_flat_folder(photos, tmp_path):
    """A split list for a folder without classes needs no class numbers."""
    for number, photo in enumerate(photos[:3]):
        storage.write_bytes(str(tmp_path / "flat" / f"{number}.png"), b"")
        photo.save(tmp_path / "flat" / f"{number}.png")
    (tmp_path / "classInd.txt").write_text("1 Archery\n")
    (tmp_path / "list.txt").write_text("0.png\n2.png\n")
    listed = str(tmp_path / "list.txt")
    report = pack_images(str(tmp_path / "flat"), str(tmp_path / "out"), PackOptions(num_workers=0, split_list=listed))
    assert report.manifest.classes == ("all",)
    assert report.manifest.num_samples == 2


def test_inspect_shards_counts_and_detects_changes(folder, tmp_path):
    """Inspection counts images per class and detects a changed shard."""
    url = str(tmp_path / "out")
    pack_images(str(folder), url, PackOptions(num_workers=0))
    inspection = inspect_shards(url, str(tmp_path / "sheet.png"))
    assert inspection.class_counts == {"cats": 3, "dogs": 3}
    assert inspection.num_measured == 6
    assert inspection.errors == []
    assert Image.open(tmp_path / "sheet.png").size == (604, 104)
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-30000])
    assert any("does not match the manifest" in fault for fault in inspect_shards(url).errors)


@pytest.mark.parametrize("kind", ["photo_shards", "video_shards"])
def test_inspect_shards_reads_files_in_small_batches(kind, request, tmp_path, monkeypatch):
    """Inspection keeps few files in memory at once, with the same result."""
    url, read = request.getfixturevalue(kind), []

    def count_reads(name):
        function = getattr(inspect, name)

        def counting(url, locations):
            read.append(len(locations))
            return function(url, locations)

        monkeypatch.setattr(inspect, name, counting)

    whole = inspect.inspect_shards(url, str(tmp_path / "whole.png"))
    monkeypatch.setattr(inspect, "_BATCH_SIZE", 2)
    count_reads("fetch_located")
    count_reads("ShardFiles")
    parts = inspect.inspect_shards(url, str(tmp_path / "parts.png"))
    assert max(read) == 2
    assert sum(read) == parts.num_measured == whole.num_measured > 2
    assert (tmp_path / "parts.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_storage_unreachable_object_store_raises(monkeypatch):
    """An unreachable object store raises an error that names the URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ValueError, match="cannot look at s3://nowhere/set"):
        storage.exists("s3://nowhere/set")
    s3fs.S3FileSystem.clear_instance_cache()


def test_pack_images_sample_members_are_adjacent(folder, tmp_path):
    """The tar members of one sample are adjacent."""
    pack_images(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        keys = [name.split(".")[0] for name in tar.getnames()]
    assert keys[0::2] == keys[1::2]
