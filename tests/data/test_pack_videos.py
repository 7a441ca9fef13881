"""Packing videos: class folders, the lists of UCF-101, and unusable files."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from small_videos import make_video

from bsq_ray.data.index import index_shards
from bsq_ray.data.inspect import inspect_shards
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import PackOptions, pack_videos
from bsq_ray.data.shard_reader import ShardFiles
from bsq_ray.data.transcode import transcode_if_needed
from bsq_ray.media.video_reader import probe, read_frames


@pytest.fixture
def folder(tmp_path, video_folders):
    """Three classes with one video each; UCF-101 and Python sort their names differently."""
    names = {"JumpRope": "bikes.mp4", "JumpingJack": "carphone_pristine.mp4", "Archery": "cityCC0.mpg"}
    for label, name in names.items():
        (tmp_path / "videos" / label).mkdir(parents=True)
        [path] = [path for side in video_folders for path in side.glob(name)]
        (tmp_path / "videos" / label / name).write_bytes(path.read_bytes())
    return tmp_path / "videos"


def classes_by_name(manifest):
    pairs = ((key, label) for shard in manifest.shards for key, label in zip(shard.keys, shard.labels, strict=True))
    return {key.split("_", 1)[1]: manifest.classes[label] for key, label in pairs}


def test_pack_videos_stores_originals_and_video_info(folder, tmp_path):
    """Videos are stored unchanged, and the manifest contains what reading needs."""
    report = pack_videos(str(folder), str(tmp_path / "out"), PackOptions(shard_mb=0.6, num_workers=0))
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest == report.manifest
    assert manifest.kind == "videos"
    assert len(manifest.shards) > 1
    assert classes_by_name(manifest) == {"bikes": "JumpRope", "carphone_pristine": "JumpingJack", "cityCC0": "Archery"}
    originals = {path.read_bytes() for path in folder.rglob("*.m*")}
    for shard in manifest.shards:
        files = ShardFiles(manifest.url, [(shard, n) for n in range(len(shard.keys))])
        for index, video in enumerate(map(shard.video, range(shard.num_samples))):
            with files.open(shard, index) as file:
                content = file.read()
            assert content in originals
            assert probe(io.BytesIO(content)).video == video
    samples = list(webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False))
    assert all("cls" in sample and {"mp4", "mpg"} & sample.keys() for sample in samples)


def test_pack_videos_with_ray_gives_identical_shards(folder, tmp_path, ray_local):
    """Packing with Ray gives the same shards as packing in this process."""
    here = pack_videos(str(folder), str(tmp_path / "here"), PackOptions(shard_mb=0.6, num_workers=0))
    there = pack_videos(str(folder), str(tmp_path / "there"), PackOptions(shard_mb=0.6))
    assert there.manifest.shards == here.manifest.shards


def test_pack_videos_reads_ucf101_split_lists(folder, tmp_path):
    """The split lists of UCF-101 are read without changes."""
    (tmp_path / "trainlist01.txt").write_bytes(b"Archery/cityCC0.mpg 1\r\nJumpRope/bikes.mp4 3\r\n")
    (tmp_path / "testlist01.txt").write_bytes(b"JumpingJack/carphone_pristine.mp4\r\n")
    train, test = (
        pack_videos(
            str(folder),
            str(tmp_path / split),
            PackOptions(num_workers=0, split_list=str(tmp_path / f"{split}list01.txt")),
        )
        for split in ("train", "test")
    )
    assert classes_by_name(train.manifest) == {"bikes": "JumpRope", "cityCC0": "Archery"}
    assert classes_by_name(test.manifest) == {"carphone_pristine": "JumpingJack"}
    assert train.manifest.classes == test.manifest.classes == ("Archery", "JumpingJack", "JumpRope")
    assert {label for shard in train.manifest.shards for label in shard.labels} == {0, 2}


def test_pack_videos_uses_class_index_file(folder, tmp_path):
    """A `classInd.txt` in the folder of the split list defines the class order."""
    (tmp_path / "classInd.txt").write_text("1 JumpRope\n2 Archery\n3 JumpingJack\n")
    (tmp_path / "list.txt").write_text("JumpRope/bikes.mp4 1\n")
    report = pack_videos(
        str(folder), str(tmp_path / "out"), PackOptions(num_workers=0, split_list=str(tmp_path / "list.txt"))
    )
    assert report.manifest.classes == ("JumpRope", "Archery", "JumpingJack")


@pytest.mark.parametrize(
    ("listed", "numbers", "message"),
    [
        ("Archery/gone.avi 1", None, "line 1: .* has no Archery/gone.avi"),
        ("Archery/cityCC0.mpg 1\nJumpRope/bikes.mp4 2", None, "line 2: JumpRope/bikes.mp4 has the class number 2, but"),
        ("\n", None, "lists no files"),
        ("Archery/cityCC0.mpg 1", "1 Archery", "does not number the class JumpRope"),
        ("Archery/cityCC0.mpg 1", "2 Archery", "must number the classes from 1"),
    ],
)
def test_pack_videos_invalid_split_list_raises(folder, tmp_path, listed, numbers, message):
    """An invalid split list raises an error that names the line."""
    (tmp_path / "list.txt").write_text(listed)
    if numbers:
        (tmp_path / "classInd.txt").write_text(numbers)
    with pytest.raises(ValueError, match=message):
        pack_videos(
            str(folder), str(tmp_path / "out"), PackOptions(num_workers=0, split_list=str(tmp_path / "list.txt"))
        )


def test_pack_videos_unusable_files_are_reported(folder, photos, tmp_path):
    """Unusable files are counted and listed by reason, and all others are packed."""
    whole = (folder / "JumpRope" / "bikes.mp4").read_bytes()
    (folder / "Archery" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "Archery" / "text.avi").write_text("no video")
    (folder / "Archery" / "short.mkv").write_bytes(make_video(photos[0], range(0, 400, 40)))
    times = [40 * n for n in range(20)] + [800 + 200 * n for n in range(8)]
    (folder / "Archery" / "uneven.mkv").write_bytes(make_video(photos[0], times))
    (folder / "Archery" / "notes.txt").write_text("not counted as damaged")
    report = pack_videos(str(folder), str(tmp_path / "out"), PackOptions(num_workers=0))
    assert report.manifest.num_samples == 4
    assert report.ignored.other_suffixes == {".txt": 1}
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in report.damaged_files] == ["cut.mp4", "text.avi"]
    assert [line.rsplit("/", 1)[1] for line in report.too_short_files] == ["short.mkv: has 10 frames, fewer than 16"]
    assert [line.rsplit("/", 1)[1] for line in report.changed_files] == ["uneven.mkv: variable rate, now 25 fps"]
    for name, lines in {
        "damaged": report.damaged_files,
        "too-short": report.too_short_files,
        "changed": report.changed_files,
    }.items():
        assert (tmp_path / "out" / f"{name}.txt").read_text().splitlines() == lines
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "short.mkv").write_bytes((folder / "Archery" / "short.mkv").read_bytes())
    with pytest.raises(ValueError, match="none of the 1 videos in .* is long enough; first error: .*short.mkv"):
        pack_videos(str(tmp_path / "few"), str(tmp_path / "none"), PackOptions(num_workers=0))
    assert (
        pack_videos(
            str(tmp_path / "few"), str(tmp_path / "all"), PackOptions(num_workers=0, min_frames=4)
        ).manifest.num_samples
        == 1
    )


def test_pack_videos_variable_rate_keeps_playback_speed(photos, tmp_path):
    """A video with a variable frame rate keeps its playback speed."""
    times = [40 * n for n in range(20)] + [800 + 200 * n for n in range(8)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "uneven.mkv").write_bytes(make_video(photos[0], times))
    manifest = pack_videos(str(tmp_path / "in"), str(tmp_path / "out"), PackOptions(num_workers=0)).manifest
    [shard] = manifest.shards
    video = shard.video(0)
    assert (video.frames, video.fps) == (56, pytest.approx(25))
    source = list(read_frames(io.BytesIO(make_video(photos[0], times)), _probe_video(photos[0], times), 0, 28, 1))
    with ShardFiles(manifest.url, [(shard, 0)]).open(shard, 0) as file:
        made = list(read_frames(file, video, 0, 56, 1))
    for slot, image in enumerate(made):
        frame_index = max(n for n, time in enumerate(times) if time <= 40 * slot)
        difference = np.abs(np.asarray(image, float) - np.asarray(source[frame_index], float)).mean()
        assert difference < 4, (slot, frame_index)


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        # Frames are a millisecond apart, and then almost a minute.
        ([*range(30), *range(30, 20 * 50_000, 50_000)], "require 950031 frames instead of 50 at 1000 fps"),
        ([*range(0, 800, 40), 90_000, *range(90_100, 91_000, 100)], "jump by 89 s"),
    ],
)
def test_transcode_broken_timestamps_raises(photos, times, reason):
    """Time stamps that require excessive copies of frames raise an error."""
    with pytest.raises(ValueError, match=f"its time stamps {reason}"):
        transcode_if_needed(make_video(photos[0], times), "mkv", None, 16)


def _probe_video(photo, times):
    return probe(io.BytesIO(make_video(photo, times))).video


def test_pack_videos_max_side_limits_longer_side(folder, tmp_path):
    """`max_side` limits the longer side of every video."""
    manifest = pack_videos(str(folder), str(tmp_path / "out"), PackOptions(max_side=90, num_workers=0)).manifest
    videos = [video for shard in manifest.shards for video in map(shard.video, range(shard.num_samples))]
    assert {max(video.width, video.height) for video in videos} == {90}
    assert sorted(video.frames for video in videos) == [120, 190, 250]
    assert all(len(video.key_frames) >= video.frames // 12 for video in videos), "decoding can start anywhere"


def test_inspect_shards_of_videos_counts_frames(folder, tmp_path):
    """Inspection shows one frame of each video and reports frame counts, durations and frame rates."""
    url = str(tmp_path / "out")
    pack_videos(str(folder), url, PackOptions(num_workers=0))
    inspection = inspect_shards(url, str(tmp_path / "sheet.png"))
    assert inspection.class_counts == {"Archery": 1, "JumpRope": 1, "JumpingJack": 1}
    assert (inspection.num_measured, inspection.errors) == (3, [])
    assert inspection.frame_counts == (120, 190, 250)
    assert inspection.total_duration_s == pytest.approx(250 / 25 + 190 / 25 + 120 / 29.97, rel=0.01)
    assert "25 frames/s (2)" in inspection.frame_rates
    assert Image.open(tmp_path / "sheet.png").size == (304, 104)
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:200_000])
    faults = inspect_shards(url).errors
    assert any("does not match the manifest" in fault for fault in faults)
    assert any("the shard ends after" in fault for fault in faults)


def test_index_shards_indexes_external_video_shards(folder, tmp_path):
    """Video shards written by another program can be indexed."""
    with webdataset.TarWriter(str(tmp_path / "other-0.tar")) as writer:
        for number, path in enumerate(sorted(folder.rglob("*.m*"))):
            writer.write({"__key__": f"n{number}", path.suffix[1:]: path.read_bytes(), "cls": number})
    manifest = index_shards(str(tmp_path)).manifest
    assert (manifest.kind, manifest.shards[0].labels) == ("videos", (0, 1, 2))
    assert sorted(manifest.num_frames.tolist()) == [120, 190, 250]
    with tarfile.open(tmp_path / "other-0.tar", "a") as tar:
        tar.add(__file__, "n9.mp4")
    report = index_shards(str(tmp_path))
    assert report.manifest.num_samples == 3
    [reason] = report.describe_unused()
    assert "1 videos that cannot be read, such as other-0.tar: n9.mp4 (not a video of a known format" in reason
