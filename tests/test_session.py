"""Joining Ray where there is none."""

import socket
import time

import pytest

from bsq_ray.session import ray_session


def test_an_address_without_a_cluster_is_told_at_once(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"no Ray cluster answers at {address}"), ray_session(address):
        pass
    assert time.monotonic() - began < 10
