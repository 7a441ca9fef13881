"""Log of a run: one JSON object per line, without duplicate steps after a resume."""

import json
import os
import threading
from concurrent.futures import wait

import pytest
import torch
from PIL import Image

from bsq_ray import storage
from bsq_ray.training.monitoring.metrics_file import read_metrics_file
from bsq_ray.training.monitoring.metrics_log import MetricsLog
from bsq_ray.training.monitoring.metrics_sinks import TensorBoardSink
from bsq_ray.training.monitoring.segmented_log import SegmentedLogSink


@pytest.fixture(params=["folder", "s3"])
def out(request, tmp_path):
    return str(tmp_path / "run") if request.param == "folder" else request.getfixturevalue("bucket")


def steps(out):
    return [json.loads(line)["step"] for line in storage.read_bytes(f"{out}/metrics.jsonl").decode().splitlines()]


def test_metrics_log_resumed_drops_later_records(out):
    """A resumed log drops records written after the checkpoint."""
    log = MetricsLog(out, 0)
    for step in (1, 2, 3):
        log.write({"kind": "training", "step": step, "loss": 0.5})
    log.close()
    assert steps(out) == [1, 2, 3]
    log = MetricsLog(out, 2)
    assert steps(out) == [1, 2]
    log.write({"kind": "training", "step": 3, "loss": 0.4})
    log.close()
    assert steps(out) == [1, 2, 3]
    assert len(storage.list_folder(f"{out}/tensorboard")) == 2


def test_metrics_log_truncated_line_is_dropped(out):
    """A last line truncated by a crash is dropped."""
    storage.write_bytes(f"{out}/metrics.jsonl", b'{"kind": "training", "step": 1}\n{"kind": "trai')
    MetricsLog(out, 5).close()
    assert steps(out) == [1]


def test_metrics_log_record_is_readable_immediately(tmp_path):
    """A record is readable while the run continues."""
    log = MetricsLog(str(tmp_path), 0)
    log.write({"kind": "training", "step": 1})
    assert steps(tmp_path) == [1]
    log.close()


def test_metrics_log_disk_full_writes_later(tmp_path):
    """Records that a full disk rejects are written once there is space."""
    log, file, backup = MetricsLog(str(tmp_path), 0), tmp_path / "metrics.jsonl", tmp_path / "backup.jsonl"
    log.write({"kind": "training", "step": 1})
    file.rename(backup)
    file.symlink_to("/dev/full")
    for step in range(2, 40):
        # More scalars than TensorBoard's queue has slots.
        log.write({"kind": "training", "step": step, "loss": 0.5})
    with pytest.raises(storage.StorageUnavailableError, match="cannot write .*metrics.jsonl.* No space left"):
        log.flush()
    file.unlink()
    backup.rename(file)
    log.write({"kind": "training", "step": 40})
    assert steps(tmp_path) == list(range(1, 41))
    log.close()
    assert steps(tmp_path) == list(range(1, 41))


def read_events(file):
    """Return (tag, step, value) of the scalars in a TensorBoard file: length, checksum, event, checksum per record."""
    from tensorboardX.proto.event_pb2 import Event

    content, scalars = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return scalars


def record_of(step):
    return {"kind": "training", "step": step, "loss": 1 / step}


@pytest.fixture
def uploads(monkeypatch):
    """Bytes of each write to storage, of whole files and of copies."""
    sizes = []
    write_text, upload = storage.write_text, storage.upload

    def counted_write(url, text):
        sizes.append(len(text))
        write_text(url, text)

    def counted_upload(path, url):
        sizes.append(os.path.getsize(path))
        upload(path, url)

    monkeypatch.setattr(storage, "write_text", counted_write)
    monkeypatch.setattr(storage, "upload", counted_upload)
    return sizes


@pytest.mark.parametrize("sink_type", [SegmentedLogSink, TensorBoardSink])
def test_uploaded_bytes_are_linear_in_log_length(tmp_path, uploads, sink_type):
    """A log twice or four times as long uploads twice or four times as many bytes, flushed after every second record.

    A whole file that is written again would upload 4 and 16 times as many. What a flush finds varies a little.
    """
    totals = []
    for length in (200, 400, 800):
        uploads.clear()
        sink = sink_type(f"file://{tmp_path}/{length}", 0, segment_bytes=1000)
        for step in range(1, length + 1):
            sink.write(record_of(step))
            if step % 2 == 0:
                sink.flush()
                # One upload runs at a time, so without waiting for it some flushes would upload nothing.
                wait([sink._background._future])
        sink.close()
        totals.append(sum(uploads))
    assert totals[1] == pytest.approx(2 * totals[0], rel=0.3)
    assert totals[2] == pytest.approx(4 * totals[0], rel=0.3)


@pytest.mark.parametrize("last_step", [0, 3, 50, 100])
def test_segmented_log_resumed_continues_after_last_step(tmp_path, last_step):
    """A resumed log drops later records, rewrites no earlier segment, and is read as one."""
    out = f"file://{tmp_path}"
    sink = SegmentedLogSink(out, 0, segment_bytes=500)
    for step in range(1, 101):
        sink.write(record_of(step))
        sink.close()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) > 5
    resumed = SegmentedLogSink(out, last_step, segment_bytes=500)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept.keys() & {name for name in before if kept.get(name) != before[name]}) <= 1
    assert [record["step"] for record in read_metrics_file(f"{out}/metrics.jsonl").records] == [
        *range(1, last_step + 1)
    ]
    for step in range(last_step + 1, 121):
        resumed.write(record_of(step))
        resumed.close()
    assert read_metrics_file(f"{out}/metrics.jsonl").records == [record_of(step) for step in range(1, 121)]


def test_segments_copied_to_disk_become_one_file(tmp_path):
    """A run that is copied from an object store resumes on a local disk with its whole log."""
    sink = SegmentedLogSink(f"file://{tmp_path}", 0, segment_bytes=100)
    for step in range(1, 11):
        sink.write(record_of(step))
        sink.close()
    assert len(list(tmp_path.iterdir())) > 2
    MetricsLog(str(tmp_path), 8, trackers=()).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_segmented_log_flush_does_not_wait_for_storage(tmp_path, monkeypatch):
    """A flush returns while storage hangs, and records of a failed upload are part of the next one."""
    out, write_text = f"file://{tmp_path}", storage.write_text
    sink, released = SegmentedLogSink(out, 0), threading.Event()

    def hang_and_fail(url, text):
        assert released.wait(60)
        raise storage.StorageUnavailableError("503")

    monkeypatch.setattr(storage, "write_text", hang_and_fail)
    sink.write(record_of(1))
    sink.flush()
    sink.write(record_of(2))
    sink.flush()
    released.set()
    wait([sink._background._future])
    monkeypatch.setattr(storage, "write_text", write_text)
    with pytest.raises(storage.StorageUnavailableError, match="503"):
        sink.flush()
    sink.close()
    assert steps(out) == [1, 2]


def test_tensorboard_files_of_a_run_contain_all_scalars(tmp_path):
    """Each scalar is in one of the files, which are as many as their size requires."""
    sink = TensorBoardSink(str(tmp_path), 0, segment_bytes=500)
    for step in range(1, 101):
        sink.write(record_of(step))
        sink.flush()
    sink.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) > 5
    assert [event[1] for file in files for event in read_events(file)] == list(range(1, 101))


def test_metrics_log_scalars_reach_tensorboard(tmp_path):
    """Numbers of a record are written to TensorBoard under "kind/name"."""
    log = MetricsLog(str(tmp_path), 0)
    log.write({"kind": "training", "step": 1, "loss": 0.5, "weights": "ema"})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert read_events(file) == [("training/loss", 1, 0.5)]


def test_metrics_log_image_is_png(out):
    log = MetricsLog(out, 0)
    image_3HW = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    log.image("step-0000000", image_3HW)
    log.close()
    with storage.open_url(f"{out}/samples/step-0000000.png") as file:
        image = Image.open(file)
        assert image.size == (5, 4)
        assert image.getpixel((1, 0)) == (1, 21, 41)
