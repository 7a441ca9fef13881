"""Shards of videos made elsewhere: damaged ones are left out, counted and named."""

import pytest
from foreign_shards import write_tar
from small_videos import make_street_video

from bsq_ray.data.index import index_shards
from bsq_ray.data.inspect import inspect_shards


@pytest.mark.parametrize("damaged", [b"<html>", make_street_video(8)[:900], make_street_video(8)[200:]])
def test_index_shards_leaves_out_videos_that_cannot_be_read(tmp_path, damaged):
    """A damaged video and its label are counted and named, and the other videos are indexed."""
    video = make_street_video(8)
    members = [("a.mp4", video), ("a.cls", "1"), ("b.mp4", damaged), ("b.cls", "0"), ("c.mp4", video), ("c.cls", "0")]
    write_tar(tmp_path / "s.tar", members)
    report = index_shards(str(tmp_path))
    assert [key for shard in report.manifest.shards for key in shard.keys] == ["a", "c"]
    assert report.num_used + sum(report.unused.values()) == report.num_members == 6
    [label, reason] = sorted(report.describe_unused())
    assert label == "1 labels of videos that cannot be read, such as s.tar: b.cls"
    assert reason.startswith("1 videos that cannot be read, such as s.tar: b.mp4 (")
    assert inspect_shards(str(tmp_path)).errors == []


def test_index_shards_only_damaged_videos_raises(tmp_path):
    """A shard in which no video can be read raises an error that names one of them."""
    write_tar(tmp_path / "s.tar", [("a.mp4", b"<html>"), ("a.cls", "1")])
    with pytest.raises(
        ValueError, match=r"s\.tar contains no images .* 1 videos that cannot be read, such as s.tar: a.mp4"
    ):
        index_shards(str(tmp_path))
