"""Observers of a run never end or block it: logs, trackers, gauges, sample images, the progress display."""

import json
import logging
import threading
import time

import pytest
import torch
from small_runs import RecordingReporter, local_worker, small_spec

from bsq_ray import storage
from bsq_ray.training.monitoring import metrics_log
from bsq_ray.training.monitoring.background_sink import BackgroundSink
from bsq_ray.training.monitoring.console import ProgressLine
from bsq_ray.training.monitoring.metrics_file import read_metrics_file
from bsq_ray.training.monitoring.metrics_log import MetricsLog
from bsq_ray.training.monitoring.metrics_sinks import JsonLinesSink, TensorBoardSink
from bsq_ray.training.monitoring.prometheus import Gauges
from bsq_ray.training.run_coordinator import RayReporter
from bsq_ray.training.run_recorder import RunRecorder

RECORD = {"kind": "training", "step": 1, "loss": 0.5}
ERRORS = [RuntimeError("broken"), OSError(5, "Input/output error"), UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal")]
DAMAGE = {
    "zeros": bytes(40) + b"\n",
    "not UTF-8": b'{"kind": "\xff", "step": 2}\n',
    "half a line": b'{"kind": "trai\n',
    "two lines in one": b'{"kind": "a", "step": 1}{"kind": "a", "step": 2}\n',
    "another JSON value": b"[1, 2]\n3\nnull\n",
    "no step": b'{"kind": "training"}\n',
    "step is text": b'{"kind": "training", "step": "1"}\n',
    "empty line": b"\n",
    "deep nesting": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_skipped_with_a_warning(tmp_path, damage):
    """A resumed log keeps the readable records and names the file."""
    url, line = str(tmp_path / "metrics.jsonl"), json.dumps(RECORD).encode() + b"\n"
    storage.write_bytes(url, line + damage + line)
    assert read_metrics_file(url).records == [RECORD, RECORD]
    warnings = []
    MetricsLog(str(tmp_path), 5, trackers=(), on_warning=warnings.append).close()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{url}: ")
    assert warnings[0].endswith("skipped")
    assert storage.read_bytes(url) == line + line


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("method", ["__init__", "write", "flush", "close"])
@pytest.mark.parametrize("sink", [JsonLinesSink, TensorBoardSink])
def test_failing_sink_warns_once(tmp_path, monkeypatch, sink, method, error):
    """Whatever a sink raises, at whatever call, the log warns once and continues without it."""
    monkeypatch.setattr(sink, method, fail_with(error))
    warnings = []
    log = MetricsLog(str(tmp_path), 0, on_warning=warnings.append)
    for _ in range(3):
        log.write(RECORD)
        log.flush()
    log.close()
    assert len(warnings) == 1
    assert "receives no further records" in warnings[0]
    if sink is TensorBoardSink:
        assert len(read_metrics_file(str(tmp_path / "metrics.jsonl")).records) == 3


@pytest.mark.parametrize("content", ["folder", "read-only"])
def test_unwritable_log_file_does_not_end_the_run(tmp_path, monkeypatch, content):
    if content == "folder":
        (tmp_path / "metrics.jsonl").mkdir()
    else:
        monkeypatch.setattr(storage, "write_text", fail_with(ValueError("cannot write: Permission denied")))
    warnings = []
    log = MetricsLog(str(tmp_path), 0, trackers=(), on_warning=warnings.append)
    log.write(RECORD)
    log.close()
    assert [warning.split(":")[0] for warning in warnings] == ["metrics.jsonl receives no further records"]


class HangingSink:
    """A tracker whose service accepts a connection and never responds."""

    def __init__(self, event):
        self.event = event

    def write(self, record):
        self.event.wait(20)

    def close(self):
        pass


def test_hanging_tracker_does_not_block_the_run(tmp_path, monkeypatch):
    """Writing returns at once, and closing gives up with a warning."""
    event, warnings = threading.Event(), []
    monkeypatch.setattr(metrics_log, "build_tracker", lambda *_: HangingSink(event))
    monkeypatch.setattr(metrics_log, "BackgroundSink", lambda build: BackgroundSink(build, close_timeout_s=0.1))
    start = time.monotonic()
    log = MetricsLog(str(tmp_path), 0, trackers=["wandb"], on_warning=warnings.append)
    for _ in range(100):
        log.write(RECORD)
    log.close()
    assert time.monotonic() - start < 10
    assert warnings == ["wandb receives no further records: TimeoutError: 100 records were not accepted within 0.1 s"]
    event.set()


def test_background_sink_with_too_many_records_raises():
    event = threading.Event()
    sink = BackgroundSink(lambda: HangingSink(event), max_pending_records=3)
    with pytest.raises(TimeoutError, match="3 records wait for it"):
        list(map(sink.write, [RECORD] * 10))
    event.set()


@pytest.mark.parametrize("path", ["/runs/küche 猫", "/runs/caf\udce9", "/runs/a b%c", "s3://bucket/ü"])
def test_gauges_label_is_ascii(monkeypatch, path):
    """Any folder becomes a label that Ray accepts, and different folders have different labels."""
    labels = []

    class Gauge:
        def __init__(self, *_, **__):
            pass

        def set(self, value, tags):
            labels.append(tags["run"].encode("ascii"))

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    warnings = []
    for run in (path, f"{path}2"):
        Gauges(run, warnings.append).update(RECORD)
    assert len(set(labels)) == 2
    assert not warnings


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failing_gauges_warn_once(monkeypatch, error):
    """The coordinator still receives every record."""
    records = []

    class Coordinator:
        class record:
            remote = staticmethod(records.append)

    monkeypatch.setattr("ray.util.metrics.Gauge", fail_with(error))
    reporter = RayReporter(Coordinator, "/runs/x")
    for _ in range(3):
        reporter.record(RECORD)
    assert records.count(RECORD) == 3
    [warning] = [record["text"] for record in records if record != RECORD]
    assert warning.startswith("Prometheus receives no further records: ")


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failing_sample_image_is_skipped(tmp_path, monkeypatch, error):
    reporter = RecordingReporter()
    recorder = RunRecorder(small_spec("data", str(tmp_path)), local_worker(reporter))
    recorder.open()
    monkeypatch.setattr(MetricsLog, "image", fail_with(error))
    recorder.write_sample_image(torch.zeros(3, 4, 4, dtype=torch.uint8))
    recorder.close()
    assert [record["text"] for record in reporter.records] == [f"{error}; the image is skipped"]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failing_progress_display_warns_once(monkeypatch, caplog, error):
    """The display ends, for example because the terminal is gone; the run does not."""
    with ProgressLine() as line, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(line.console, "print", fail_with(error))
        for _ in range(3):
            line.show_record({"kind": "warning", "step": 1, "text": "x"})
    assert len(caplog.records) == 1
    assert "the progress display ends" in caplog.text
