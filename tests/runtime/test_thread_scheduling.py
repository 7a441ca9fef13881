"""Threads keep their normal scheduling policy, whatever an encoder does."""

import os
import threading
from fractions import Fraction

import numpy as np
import pytest

from bsq_ray.evaluation.compression.clip_files import VideoClip
from bsq_ray.evaluation.compression.video_codecs import standard_video_codecs
from bsq_ray.runtime.thread_scheduling import normal_scheduling


def policies():
    """The policies of all threads of this process."""
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


@pytest.fixture
def realtime_allowed():
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        pytest.skip("this user may not start real-time threads")


def test_realtime_threads_become_normal(realtime_allowed):
    end = threading.Event()
    with normal_scheduling():
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        threading.Thread(target=end.wait, daemon=True).start()
        during = policies()
    after = policies()
    end.set()
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert os.SCHED_RR in during
    assert after == {os.SCHED_OTHER}


def test_realtime_caller_stays_realtime(realtime_allowed):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        with normal_scheduling():
            pass
        assert os.sched_getscheduler(0) == os.SCHED_FIFO
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.parametrize("name", ["H.264", "HEVC", "AV1"])
def test_video_encoders_leave_no_realtime_thread(name, monkeypatch):
    """SVT-AV1 starts real-time threads if the user is root; they are normal before the first frame is encoded."""
    codec = standard_video_codecs().get(name)
    if codec is None:
        pytest.skip(f"FFmpeg has no encoder for {name}")
    seen = []
    original = VideoClip.frames_420

    def frames_420(clip):
        for frame in original(clip):
            seen.append(policies())
            yield frame

    monkeypatch.setattr(VideoClip, "frames_420", frames_420)
    frames_THW3 = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    codec.encode(VideoClip(frames_THW3, Fraction(25)), codec.qualities[0])
    assert seen == [{os.SCHED_OTHER}] * 4
    assert policies() == {os.SCHED_OTHER}
