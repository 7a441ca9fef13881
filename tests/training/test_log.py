"""The log of a run: one JSON object per line, never a step twice."""

import json

import pytest
import torch
from PIL import Image

from bsq_ray import storage
from bsq_ray.training.monitoring.metrics_log import Log


@pytest.fixture(params=["folder", "s3"])
def out(request, tmp_path):
    return str(tmp_path / "run") if request.param == "folder" else request.getfixturevalue("bucket")


def steps(out):
    return [json.loads(line)["step"] for line in storage.read_bytes(f"{out}/metrics.jsonl").decode().splitlines()]


def test_a_resumed_log_drops_what_was_written_after_the_checkpoint(out):
    log = Log(out, 0)
    for step in (1, 2, 3):
        log.write({"kind": "training", "step": step, "loss": 0.5})
    log.close()
    assert steps(out) == [1, 2, 3]
    log = Log(out, 2)
    assert steps(out) == [1, 2]
    log.write({"kind": "training", "step": 3, "loss": 0.4})
    log.close()
    assert steps(out) == [1, 2, 3]
    assert len(storage.list_folder(f"{out}/tensorboard")) == 2


def test_a_line_cut_off_by_a_crash_is_dropped(out):
    storage.write_bytes(f"{out}/metrics.jsonl", b'{"kind": "training", "step": 1}\n{"kind": "trai')
    Log(out, 5).close()
    assert steps(out) == [1]


def test_a_record_is_readable_while_the_run_goes_on(tmp_path):
    log = Log(str(tmp_path), 0)
    log.write({"kind": "training", "step": 1})
    assert steps(tmp_path) == [1]
    log.close()


def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path):
    log, file, kept = Log(str(tmp_path), 0), tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"
    log.write({"kind": "training", "step": 1})
    file.rename(kept)
    file.symlink_to("/dev/full")
    for step in range(2, 40):
        # More numbers than TensorBoard's queue holds.
        log.write({"kind": "training", "step": step, "loss": 0.5})
    with pytest.raises(storage.StorageUnavailableError, match="cannot write .*metrics.jsonl.* No space left"):
        log.flush()
    file.unlink()
    kept.rename(file)
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


def test_numbers_reach_tensorboard_by_kind(tmp_path):
    log = Log(str(tmp_path), 0)
    log.write({"kind": "training", "step": 1, "loss": 0.5, "weights": "ema"})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert read_events(file) == [("training/loss", 1, 0.5)]


def test_a_picture_is_a_png(out):
    log = Log(out, 0)
    picture_3HW = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    log.picture("step-0000000", picture_3HW)
    log.close()
    with storage.open_url(f"{out}/samples/step-0000000.png") as file:
        image = Image.open(file)
        assert image.size == (5, 4)
        assert image.getpixel((1, 0)) == (1, 21, 41)
