"""Uploads in a thread: one at a time, and none of the data is left behind."""

import threading

import pytest

from bsq_ray.runtime.daemon_thread import BackgroundUpload


class SlowStorage:
    """Uploads all data of the time of a call; each call waits until it is released."""

    def __init__(self):
        self.data, self.uploaded = [], []
        self.started, self.release = threading.Semaphore(0), threading.Semaphore(0)
        self.error = None

    def upload(self):
        snapshot = self.data[:]
        self.started.release()
        assert self.release.acquire(timeout=20)
        if self.error:
            raise self.error
        self.uploaded.append(snapshot)


def test_background_upload_repeats_for_data_of_a_running_upload():
    """Data that arrives during an upload is uploaded next, without another call."""
    storage = SlowStorage()
    background = BackgroundUpload(storage.upload, "test")
    storage.data.append(1)
    background.start()
    assert storage.started.acquire(timeout=20)
    storage.data.append(2)
    background.start()
    background.start()
    storage.release.release(2)
    assert storage.started.acquire(timeout=20)
    storage.release.release()
    background.finish()
    assert storage.uploaded == [[1], [1, 2], [1, 2]]


def test_background_upload_after_error_reports_it_and_uploads_again():
    storage = SlowStorage()
    background = BackgroundUpload(storage.upload, "test")
    storage.error = OSError("no storage")
    storage.data.append(1)
    background.start()
    storage.release.release()
    while background._is_running:
        pass
    storage.error = None
    with pytest.raises(OSError, match="no storage"):
        background.start()
    storage.release.release(2)
    background.finish()
    assert storage.uploaded == [[1], [1]]
