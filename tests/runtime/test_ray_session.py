"""Ray session: unreachable clusters, failed startup, and the limits of a cluster."""

import math
import socket
import time

import pytest
import ray

from bsq_ray.runtime import ray_session as session
from bsq_ray.runtime.ray_session import max_cluster_cpus, max_cluster_gpus, ray_session


def test_ray_session_unreachable_address_fails_fast(monkeypatch):
    """An address without a Ray cluster raises an error within seconds."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"no Ray cluster responds at {address}"), ray_session(address):
        pass
    assert time.monotonic() - start < 10


def test_ray_session_failed_data_actors_disconnects(monkeypatch):
    """The session disconnects from a cluster whose Ray Data actors cannot start."""
    disconnected = []
    # Restored afterwards, because the tests share one Ray session.
    monkeypatch.setattr(session, "_connection", None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: disconnected.append(True))
    monkeypatch.setattr(
        session, "_start_ray_data_actors_on_driver_node", lambda: pytest.fail("insufficient cluster capacity")
    )
    with pytest.raises(pytest.fail.Exception, match="insufficient cluster capacity"), ray_session("auto"):
        pass
    assert disconnected


@pytest.mark.parametrize(
    ("num_processes", "num_gpus", "expected"),
    [(2, 8, 1), (8, 8, 1), (16, 8, 1 / 2), (4, 3, 1 / 2), (2, 1, 1 / 2), (2, 0, 0)],
)
def test_gpus_per_process_splits_gpus_evenly(num_processes, num_gpus, expected, monkeypatch):
    """Processes share the available GPUs, and no process spans two GPUs."""
    monkeypatch.setattr(session, "max_cluster_gpus", lambda: float(num_gpus))
    assert session.gpus_per_process(num_processes) == expected
    assert not expected or num_gpus * int(1 / expected) >= num_processes


def test_max_cluster_resources_include_autoscaler(ray_local, monkeypatch):
    """Resources that the autoscaler can add count; CPUs are unlimited if its limits are unknown."""
    assert (max_cluster_cpus(), max_cluster_gpus()) == (4, 0)
    monkeypatch.setattr(session, "_connection", None)
    assert max_cluster_cpus() == math.inf
    monkeypatch.setattr(session, "autoscaler_limits", lambda: {"CPU": 96.0, "GPU": 8.0})
    assert (max_cluster_cpus(), max_cluster_gpus()) == (96, 8)
