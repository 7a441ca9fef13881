"""Packing videos: class folders and UCF-101's lists, and what becomes of files that cannot be used."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from small_videos import made_video

from bsq_ray.data.index import index_shards
from bsq_ray.data.inspect import inspect_shards
from bsq_ray.data.manifest import read_manifest
from bsq_ray.data.pack import pack_videos
from bsq_ray.data.shard_reader import Files
from bsq_ray.data.transcode import stored_video
from bsq_ray.media.video_reader import probe, read_frames


@pytest.fixture
def folder(tmp_path, video_folders):
    """Three classes that UCF-101's numbers and Python's sort put in another order, one video each."""
    names = {"JumpRope": "bikes.mp4", "JumpingJack": "carphone_pristine.mp4", "Archery": "cityCC0.mpg"}
    for label, name in names.items():
        (tmp_path / "videos" / label).mkdir(parents=True)
        [path] = [path for side in video_folders for path in side.glob(name)]
        (tmp_path / "videos" / label / name).write_bytes(path.read_bytes())
    return tmp_path / "videos"


def labels(manifest):
    pairs = ((key, label) for shard in manifest.shards for key, label in zip(shard.keys, shard.labels, strict=True))
    return {key.split("_", 1)[1]: manifest.classes[label] for key, label in pairs}


def test_videos_are_stored_as_they_are_with_what_reading_needs(folder, tmp_path):
    report = pack_videos(str(folder), str(tmp_path / "out"), shard_mb=0.6, workers=0)
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest == report.manifest
    assert manifest.kind == "videos"
    assert len(manifest.shards) > 1
    assert labels(manifest) == {"bikes": "JumpRope", "carphone_pristine": "JumpingJack", "cityCC0": "Archery"}
    originals = {path.read_bytes() for path in folder.rglob("*.m*")}
    for shard in manifest.shards:
        files = Files(manifest, [(shard, n) for n in range(len(shard.keys))])
        for index, video in enumerate(shard.videos):
            with files.open(shard, index) as file:
                content = file.read()
            assert content in originals
            assert probe(io.BytesIO(content)).video == video
    samples = list(webdataset.WebDataset(str(tmp_path / "out/shard-000000.tar"), shardshuffle=False))
    assert all("cls" in sample and {"mp4", "mpg"} & sample.keys() for sample in samples)


def test_packing_through_ray_gives_the_same_shards(folder, tmp_path, ray_local):
    here = pack_videos(str(folder), str(tmp_path / "here"), shard_mb=0.6, workers=0)
    there = pack_videos(str(folder), str(tmp_path / "there"), shard_mb=0.6)
    assert there.manifest.shards == here.manifest.shards


def test_lists_of_ucf_101_are_read_as_they_are(folder, tmp_path):
    (tmp_path / "trainlist01.txt").write_bytes(b"Archery/cityCC0.mpg 1\r\nJumpRope/bikes.mp4 3\r\n")
    (tmp_path / "testlist01.txt").write_bytes(b"JumpingJack/carphone_pristine.mp4\r\n")
    train, test = (
        pack_videos(str(folder), str(tmp_path / split), workers=0, split_list=str(tmp_path / f"{split}list01.txt"))
        for split in ("train", "test")
    )
    assert labels(train.manifest) == {"bikes": "JumpRope", "cityCC0": "Archery"}
    assert labels(test.manifest) == {"carphone_pristine": "JumpingJack"}
    assert train.manifest.classes == test.manifest.classes == ("Archery", "JumpingJack", "JumpRope")
    assert {label for shard in train.manifest.shards for label in shard.labels} == {0, 2}


def test_class_numbers_beside_the_list_are_used(folder, tmp_path):
    (tmp_path / "classInd.txt").write_text("1 JumpRope\n2 Archery\n3 JumpingJack\n")
    (tmp_path / "list.txt").write_text("JumpRope/bikes.mp4 1\n")
    report = pack_videos(str(folder), str(tmp_path / "out"), workers=0, split_list=str(tmp_path / "list.txt"))
    assert report.manifest.classes == ("JumpRope", "Archery", "JumpingJack")


@pytest.mark.parametrize(
    ("listed", "numbers", "message"),
    [
        ("Archery/gone.avi 1", None, "line 1: there is no Archery/gone.avi"),
        ("Archery/cityCC0.mpg 1\nJumpRope/bikes.mp4 2", None, "line 2: JumpRope/bikes.mp4 has the class number 2, but"),
        ("\n", None, "lists no files"),
        ("Archery/cityCC0.mpg 1", "1 Archery", "does not number the class JumpRope"),
        ("Archery/cityCC0.mpg 1", "2 Archery", "must number the classes from 1"),
    ],
)
def test_a_wrong_list_is_named(folder, tmp_path, listed, numbers, message):
    (tmp_path / "list.txt").write_text(listed)
    if numbers:
        (tmp_path / "classInd.txt").write_text(numbers)
    with pytest.raises(ValueError, match=message):
        pack_videos(str(folder), str(tmp_path / "out"), workers=0, split_list=str(tmp_path / "list.txt"))


def test_what_cannot_be_used_is_counted_and_named_and_the_rest_is_packed(folder, photos, tmp_path):
    whole = (folder / "JumpRope" / "bikes.mp4").read_bytes()
    (folder / "Archery" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "Archery" / "text.avi").write_text("no video")
    (folder / "Archery" / "short.mkv").write_bytes(made_video(photos[0], range(0, 400, 40)))
    times = [40 * n for n in range(20)] + [800 + 200 * n for n in range(8)]
    (folder / "Archery" / "uneven.mkv").write_bytes(made_video(photos[0], times))
    (folder / "Archery" / "notes.txt").write_text("not counted as damaged")
    report = pack_videos(str(folder), str(tmp_path / "out"), workers=0)
    assert report.manifest.samples == 4
    assert report.ignored == 1
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in report.damaged] == ["cut.mp4", "text.avi"]
    assert [line.rsplit("/", 1)[1] for line in report.too_short] == ["short.mkv: has 10 frames, fewer than 16"]
    assert [line.rsplit("/", 1)[1] for line in report.changed] == ["uneven.mkv: variable rate, now 25 fps"]
    for name, lines in {"damaged": report.damaged, "too-short": report.too_short, "changed": report.changed}.items():
        assert (tmp_path / "out" / f"{name}.txt").read_text().splitlines() == lines
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "short.mkv").write_bytes((folder / "Archery" / "short.mkv").read_bytes())
    with pytest.raises(ValueError, match="none of the 1 videos in .* is long enough; the first: .*short.mkv"):
        pack_videos(str(tmp_path / "few"), str(tmp_path / "none"), workers=0)
    assert pack_videos(str(tmp_path / "few"), str(tmp_path / "all"), workers=0, min_frames=4).manifest.samples == 1


def test_a_video_of_variable_rate_keeps_its_speed(photos, tmp_path):
    times = [40 * n for n in range(20)] + [800 + 200 * n for n in range(8)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "uneven.mkv").write_bytes(made_video(photos[0], times))
    manifest = pack_videos(str(tmp_path / "in"), str(tmp_path / "out"), workers=0).manifest
    [shard] = manifest.shards
    video = shard.videos[0]
    assert (video.frames, video.fps) == (56, pytest.approx(25))
    source = list(read_frames(io.BytesIO(made_video(photos[0], times)), _probed(photos[0], times), 0, 28, 1))
    with Files(manifest, [(shard, 0)]).open(shard, 0) as file:
        made = list(read_frames(file, video, 0, 56, 1))
    for slot, image in enumerate(made):
        shown = max(n for n, time in enumerate(times) if time <= 40 * slot)
        difference = np.abs(np.asarray(image, float) - np.asarray(source[shown], float)).mean()
        assert difference < 4, (slot, shown)


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        # A rate of frames a millisecond apart, and then each of them is held for almost a minute.
        ([*range(30), *range(30, 20 * 50_000, 50_000)], "make 950031 pictures of 50 frames at 1000 fps"),
        ([*range(0, 800, 40), 90_000, *range(90_100, 91_000, 100)], "jump by 89 s"),
    ],
)
def test_time_stamps_that_ask_for_endless_copies_of_frames_are_refused(photos, times, reason):
    with pytest.raises(ValueError, match=f"its time stamps {reason}"):
        stored_video(made_video(photos[0], times), "mkv", None, 16)


def _probed(photo, times):
    return probe(io.BytesIO(made_video(photo, times))).video


def test_the_longest_side_can_be_limited(folder, tmp_path):
    manifest = pack_videos(str(folder), str(tmp_path / "out"), max_side=90, workers=0).manifest
    videos = [video for shard in manifest.shards for video in shard.videos]
    assert {max(video.width, video.height) for video in videos} == {90}
    assert sorted(video.frames for video in videos) == [120, 190, 250]
    assert all(len(video.key_frames) >= video.frames // 12 for video in videos), "decoding can begin anywhere"


def test_inspection_shows_a_frame_of_each_video_and_counts_frames(folder, tmp_path):
    url = str(tmp_path / "out")
    pack_videos(str(folder), url, workers=0)
    inspection = inspect_shards(url, str(tmp_path / "sheet.png"))
    assert inspection.per_class == {"Archery": 1, "JumpRope": 1, "JumpingJack": 1}
    assert (inspection.measured, inspection.faults) == (3, [])
    assert inspection.frames == (120, 190, 250)
    assert inspection.seconds == pytest.approx(250 / 25 + 190 / 25 + 120 / 29.97, rel=0.01)
    assert "25 frames/s (2)" in inspection.rates
    assert Image.open(tmp_path / "sheet.png").size == (304, 104)
    shard = tmp_path / "out" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:200_000])
    faults = inspect_shards(url).faults
    assert any("not the file that was packed" in fault for fault in faults)
    assert any("the shard ends after" in fault for fault in faults)


def test_shards_of_videos_made_elsewhere_are_indexed(folder, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "other-0.tar")) as writer:
        for number, path in enumerate(sorted(folder.rglob("*.m*"))):
            writer.write({"__key__": f"n{number}", path.suffix[1:]: path.read_bytes(), "cls": number})
    manifest = index_shards(str(tmp_path))
    assert (manifest.kind, manifest.shards[0].labels) == ("videos", (0, 1, 2))
    assert sorted(video.frames for video in manifest.shards[0].videos) == [120, 190, 250]
    with tarfile.open(tmp_path / "other-0.tar", "a") as tar:
        tar.add(__file__, "n9.mp4")
    with pytest.raises(ValueError, match="other-0.tar: n9 cannot be decoded"):
        index_shards(str(tmp_path))
