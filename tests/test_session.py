"""Joining a Ray that is not there, or does not do what it should."""

import socket
import time

import pytest
import ray

from bsq_ray.runtime import ray_session as session
from bsq_ray.runtime.ray_session import ray_session


def test_ray_session_unreachable_address_fails_fast(monkeypatch):
    """An address without a Ray cluster raises an error within seconds."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"no Ray cluster answers at {address}"), ray_session(address):
        pass
    assert time.monotonic() - start < 10


def test_ray_session_failed_data_actors_disconnects(monkeypatch):
    """The session disconnects from a cluster whose Ray Data actors cannot start."""
    disconnected = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: disconnected.append(True))
    monkeypatch.setattr(session, "_keep_data_services_here", lambda: pytest.fail("no node has room"))
    with pytest.raises(pytest.fail.Exception, match="no node has room"), ray_session("auto"):
        pass
    assert disconnected


@pytest.mark.parametrize(
    ("workers", "gpus", "share"), [(2, 8, 1), (8, 8, 1), (16, 8, 1 / 2), (4, 3, 1 / 2), (2, 1, 1 / 2), (2, 0, 0)]
)
def test_gpus_per_process_splits_gpus_evenly(workers, gpus, share, monkeypatch):
    """Processes share the available GPUs, and no share spans two GPUs."""
    monkeypatch.setattr(session, "gpus_within_reach", lambda: float(gpus))
    assert session.gpus_per_process(workers) == share
    assert not share or gpus * int(1 / share) >= workers, "each share lies on one GPU"
