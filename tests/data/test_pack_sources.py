"""Packing from where data sets are published, packing that resumes, and storage that is slow or fails for a while."""

import io
import itertools
import json
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from bsq_ray import storage
from bsq_ray.data import pack_shard
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_images
from bsq_ray.data.pack_source import read_source
from bsq_ray.data.shard_reader import fetch_encoded

SYNSETS = ("n01440764", "n01443537", "n01484850")
HERE = PackOptions(num_workers=0, storage_timeout_s=0)


@pytest.fixture(scope="module")
def jpegs(photos):
    """(synset, name, JPEG) of nine images."""
    images = []
    for number, photo in enumerate(photos[:9]):
        file = io.BytesIO()
        photo.resize((40, 30)).save(file, "JPEG")
        synset = SYNSETS[number % 3]
        images.append((synset, f"{synset}_{number}.JPEG", file.getvalue()))
    return images


def make_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def class_folders(folder, jpegs):
    for synset, name, data in jpegs:
        storage.write_bytes(str(folder / "tree" / synset / name), data)
    return str(folder / "tree"), HERE


def tar_of_tars(folder, jpegs):
    inner = []
    for synset in SYNSETS:
        path = make_tar(folder / f"{synset}.tar", [(name, data) for label, name, data in jpegs if label == synset])
        inner.append((f"{synset}.tar", Path(path).read_bytes()))
    return make_tar(folder / "ILSVRC2012_img_train.tar", inner), HERE


def flat_tar(folder, jpegs, text):
    files = [(f"ILSVRC2012_val_{number:08}.JPEG", data) for number, (_, _, data) in enumerate(jpegs)]
    (folder / "labels.txt").write_text(text)
    return make_tar(folder / "ILSVRC2012_img_val.tar", files), PackOptions(
        num_workers=0, label_file=str(folder / "labels.txt")
    )


def flat_tar_with_synsets(folder, jpegs):
    return flat_tar(folder, jpegs, "\n".join(synset for synset, _, _ in jpegs))


def flat_tar_with_kaggle_solution(folder, jpegs):
    rows = [f"ILSVRC2012_val_{number:08},{synset} 1 2 3 4" for number, (synset, _, _) in enumerate(jpegs)]
    return flat_tar(folder, jpegs, "\n".join(["ImageId,PredictionString", *reversed(rows)]))


def hub_parquet(folder, jpegs):
    features = {"label": {"names": list(SYNSETS), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (folder / "data").mkdir()
    for part in range(3):
        rows = jpegs[part * 3 : part * 3 + 3]
        table = pa.table(
            {
                "image": [{"bytes": data, "path": name} for _, name, data in rows],
                "label": [SYNSETS.index(synset) for synset, _, _ in rows],
            }
        )
        url = folder / "data" / f"train-{part:05}-of-00003.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), url, row_group_size=2)
    return str(folder / "data"), HERE


def web_dataset(folder, jpegs):
    (folder / "shards").mkdir()
    for part in range(3):
        with webdataset.TarWriter(str(folder / "shards" / f"train-{part}.tar")) as writer:
            for synset, name, data in jpegs[part * 3 : part * 3 + 3]:
                writer.write({"__key__": name.split(".")[0], "jpg": data, "cls": synset.encode()})
    return str(folder / "shards" / "*.tar"), HERE


@pytest.mark.parametrize(
    "prepare",
    [class_folders, tar_of_tars, flat_tar_with_synsets, flat_tar_with_kaggle_solution, hub_parquet, web_dataset],
)
def test_pack_images_reads_image_net_as_published(prepare, jpegs, tmp_path):
    """Every form of the data set gives the same images with the same classes, without unpacking by hand."""
    source, options = prepare(tmp_path, jpegs)
    manifest = pack_images(source, str(tmp_path / "out"), options).manifest
    assert manifest.classes == SYNSETS
    labels = [label for shard in manifest.shards for label in shard.labels]
    packed = zip((manifest.classes[label] for label in labels), fetch_encoded(manifest, range(9)), strict=True)
    assert sorted(packed) == sorted((synset, data) for synset, _, data in jpegs)


def test_pack_images_shuffles_row_groups(jpegs, tmp_path):
    """Rows of a row group stay together, so that a task decodes it once; their order is random."""
    source, _ = hub_parquet(tmp_path, jpegs)
    orders = []
    for seed in range(4):
        manifest = pack_images(source, str(tmp_path / f"{seed}"), PackOptions(num_workers=0, seed=seed)).manifest
        numbers = [int(key.split("_")[0]) for key in manifest.shards[0].keys]
        groups = [2 * (number // 3) + (number % 3) // 2 for number in numbers]
        assert len([1 for left, right in itertools.pairwise(groups) if left != right]) == 5
        orders.append(tuple(numbers))
    assert len(set(orders)) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("490\n361\n171\n822\n297\n482\n13\n704\n599\n", "has numbers .490, …., which do not name the classes"),
        ("n01440764\n", "has 1 lines for 9 files"),
        ("ILSVRC2012_val_00000000.JPEG n01440764\n", "has no class for 8 of 9 files"),
        ("", "is empty"),
    ],
)
def test_pack_images_unusable_label_file_raises(jpegs, tmp_path, text, message):
    """A label file that does not name the class of each image is rejected."""
    source, options = flat_tar(tmp_path, jpegs, text)
    with pytest.raises(ValueError, match=message):
        pack_images(source, str(tmp_path / "out"), options)


def test_pack_images_damaged_containers_raise(jpegs, tmp_path):
    """A truncated tar, a file that is no Parquet, unlabeled test sets and mixed folders are rejected."""
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"broken.tar is not a readable tar"):
        pack_images(str(tmp_path / "broken.tar"), str(tmp_path / "out"), HERE)
    (tmp_path / "broken.parquet").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="broken.parquet is not a readable Parquet file"):
        pack_images(str(tmp_path / "*.parquet"), str(tmp_path / "out"), HERE)
    with pytest.raises(ValueError, match="has tars and Parquet files"):
        pack_images(str(tmp_path / "broken.*"), str(tmp_path / "out"), HERE)
    with pytest.raises(ValueError, match="matches no files"):
        pack_images(str(tmp_path / "*.zip"), str(tmp_path / "out"), HERE)
    table = pa.table({"image": [{"bytes": jpegs[0][2]}], "label": [-1]})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="has the label -1, as published test sets have"):
        pack_images(str(tmp_path / "test.parquet"), str(tmp_path / "out"), HERE)


def test_pack_images_resumes_after_an_interruption(jpegs, tmp_path, monkeypatch):
    """Finished shards are kept, whatever ended the run; the result is that of a run without interruption."""
    source, _ = class_folders(tmp_path, jpegs)
    options = PackOptions(num_workers=0, storage_timeout_s=0, shard_mb=0.0025)
    whole = pack_images(source, str(tmp_path / "whole"), options).manifest
    assert whole.num_shards >= 3
    reads = []

    def fail_after_two_shards(file):
        reads.append(file.url)
        if (tmp_path / "out" / "shard-000001.arrow").exists():
            raise storage.StorageUnavailableError("no answer")
        return read_source(file)

    monkeypatch.setattr(pack_shard, "read_source", fail_after_two_shards)
    with pytest.raises(storage.StorageUnavailableError):
        pack_images(source, str(tmp_path / "out"), options)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    monkeypatch.setattr(pack_shard, "read_source", read_source)
    report = pack_images(source, str(tmp_path / "out"), options)
    assert report.num_reused_shards == 2
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())
    assert (report.manifest.hash, report.manifest.num_samples) == (whole.hash, whole.num_samples)


def test_pack_images_other_files_or_options_pack_again(jpegs, tmp_path):
    """A shard of other files or options is never taken for a finished one; reports of finished shards are kept."""
    source, _ = class_folders(tmp_path, jpegs)
    (tmp_path / "tree" / SYNSETS[0] / "damaged.jpg").write_text("no image")
    first = pack_images(source, str(tmp_path / "out"), HERE)
    (tmp_path / "out" / "manifest.parquet").unlink()
    again = pack_images(source, str(tmp_path / "out"), HERE)
    assert (again.num_reused_shards, again.damaged_files) == (1, first.damaged_files)
    for options in (PackOptions(num_workers=0, max_side=20), PackOptions(num_workers=0, seed=1)):
        (tmp_path / "out" / "manifest.parquet").unlink()
        assert pack_images(source, str(tmp_path / "out"), options).num_reused_shards == 0


def test_pack_images_retries_while_storage_is_unavailable(jpegs, tmp_path, monkeypatch):
    """An error that passes is retried and reported, as in training."""
    source, _ = class_folders(tmp_path, jpegs)
    calls = []

    def fail_once(file):
        calls.append(file)
        if len(calls) == 1:
            raise storage.StorageUnavailableError(f"cannot read {file.url}: no answer")
        return read_source(file)

    monkeypatch.setattr(pack_shard, "read_source", fail_once)
    report = pack_images(source, str(tmp_path / "out"), PackOptions(num_workers=0, storage_timeout_s=60))
    assert report.manifest.num_samples == 9
    assert report.damaged_files == []
    assert ["no answer; trying again" in line for line in report.retries] == [True]


def test_pack_images_reads_ahead(jpegs, tmp_path, monkeypatch):
    """A task waits for many files at a time, so slow storage costs the time of a few reads."""
    source, _ = class_folders(tmp_path, jpegs)
    active, most_active = [], []

    def slow(file):
        active.append(file)
        most_active.append(len(active))
        time.sleep(0.05)
        active.remove(file)
        return read_source(file)

    monkeypatch.setattr(pack_shard, "read_source", slow)
    pack_images(source, str(tmp_path / "out"), HERE)
    assert max(most_active) >= 5


def test_pack_images_from_a_tar_on_an_object_store(jpegs, bucket, tmp_path):
    """A tar of tars in a bucket is packed by byte ranges."""
    source, _ = tar_of_tars(tmp_path, jpegs)
    storage.upload(source, f"{bucket}/ILSVRC2012_img_train.tar")
    pack_images(f"{bucket}/ILSVRC2012_img_train.tar", f"{bucket}/out", HERE)
    assert set(fetch_encoded(read_manifest(f"{bucket}/out"), range(9))) == {data for _, _, data in jpegs}
