"""The log of a run: one JSON object per line, never a step twice."""

import json

import pytest
import torch
from PIL import Image

from bsq_ray import storage
from bsq_ray.training.monitoring.metrics_log import MetricsLog


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
    log, file, backup = MetricsLog(str(tmp_path), 0), tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"
    log.write({"kind": "training", "step": 1})
    file.rename(backup)
    file.symlink_to("/dev/full")
    for step in range(2, 40):
        # More numbers than TensorBoard's queue holds.
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
    """(tag, step, value) of the scalars in a TensorBoard file: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, scalars = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return scalars


def test_metrics_log_scalars_reach_tensorboard(tmp_path):
    """Numbers of a record are written to TensorBoard under "kind/name"."""
    log = MetricsLog(str(tmp_path), 0)
    log.write({"kind": "training", "step": 1, "loss": 0.5, "weights": "ema"})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert read_events(file) == [("training/loss", 1, 0.5)]


def test_metrics_log_image_is_png(out):
    log = MetricsLog(out, 0)
    picture_3HW = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    log.image("step-0000000", picture_3HW)
    log.close()
    with storage.open_url(f"{out}/samples/step-0000000.png") as file:
        image = Image.open(file)
        assert image.size == (5, 4)
        assert image.getpixel((1, 0)) == (1, 21, 41)
