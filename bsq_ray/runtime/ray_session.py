"""Start Ray or connect to a cluster, with the settings this package relies on."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bsq_ray.runtime._ray_internals import autoscaler_limits

# Ray reads these when it is imported, so they are set before; values set by the user stay.
_RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A draining node leads to a smaller group, chosen in training/ray_trainer.py; Ray's own watcher would end the run.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # The actor pools of Ray Data log a warning about restarts that no user can act on.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True)
class _Connection:
    """Connection of this process to Ray, made by `ray_session`."""

    dashboard_url: str
    started_here: bool


# Ray connects a process, not a thread, so there is at most one.
_connection: _Connection | None = None


@contextmanager
def ray_session(
    address: str | None = None, num_cpus: int | None = None, include_dashboard: bool = False
) -> Iterator[str]:
    """Connect to a cluster, or start a local Ray, for the duration of the block.

    Args:
        address: a cluster ("auto" or host:port). None uses RAY_ADDRESS, which `ray job submit` sets, or starts a Ray on
            this node. A process that is connected already keeps its connection.
        num_cpus: logical CPUs of a Ray that is started here. None is the number of cores, at least 4, because data
            tasks need a CPU in addition to the workers'.
        include_dashboard: start a dashboard with a Ray that is started here.

    Yields:
        URL of the dashboard; empty if there is none, or if other code has connected this process.

    Raises:
        ValueError: no Ray cluster responds at `address`.
    """
    global _connection
    for name, value in _RAY_ENV.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield _connection.dashboard_url if _connection else ""
        return
    address = address or os.environ.get("RAY_ADDRESS")
    context = _connect(address) if address else _start_local(num_cpus, include_dashboard)
    try:
        if address:
            _start_ray_data_actors_on_driver_node()
        _connection = _Connection(_with_scheme(context.dashboard_url), started_here=not address)
        yield _connection.dashboard_url
    finally:
        _connection = None
        ray.shutdown()


def _connect(address: str) -> Any:
    import ray

    _check_reachable(address)
    try:
        with _silence_native_stderr():
            return ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from error


def _start_local(num_cpus: int | None, include_dashboard: bool) -> Any:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    with _silence_native_stderr():
        return ray.init(
            address="local",
            num_cpus=num_cpus or max(4, os.cpu_count() or 1),
            include_dashboard=include_dashboard,
            log_to_driver=False,
            logging_level="warning",
            object_store_memory=2**30,
        )


def _start_ray_data_actors_on_driver_node() -> None:
    """Make Ray Data start its two bookkeeping actors on this node.

    Ray Data starts them once per cluster, on the node that uses it first, and they outlive the job. On a worker's node
    they would prevent the autoscaler from removing that node.
    """
    import ray

    ray.data.from_items([0]).map_batches(lambda batch: batch, num_cpus=0).materialize()


def _with_scheme(url: str | None) -> str:
    return f"http://{url}" if url and "://" not in url else url or ""


def max_cluster_resources() -> dict[str, float]:
    """Return the resources of the connected cluster, including those that its autoscaler can add."""
    import ray

    current = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    limits = autoscaler_limits() or {}
    return {name: max(current.get(name, 0.0), limits.get(name, 0.0)) for name in current.keys() | limits.keys()}


def max_cluster_gpus() -> float:
    """Return the maximum number of GPUs that the cluster is known to be able to have."""
    return max_cluster_resources().get("GPU", 0.0)


def max_cluster_cpus() -> float:
    """Return the maximum number of CPUs, or inf if the autoscaler's limits are unknown."""
    return max_cluster_resources().get("CPU", 0.0) if cluster_limits_known() else math.inf


def cluster_limits_known() -> bool:
    """Return whether the cluster can never exceed `max_cluster_resources`.

    True for a Ray that `ray_session` started, and if the autoscaler publishes its limits. The autoscalers of `ray up`
    and KubeRay do not publish them.
    """
    return (_connection is not None and _connection.started_here) or autoscaler_limits() is not None


def gpus_per_process(num_processes: int) -> float:
    """Return the GPUs each process requests: 1, an even fraction if there are fewer GPUs, or 0 on a cluster without.

    A process that requests none sees all GPUs of its node and would use the first one.
    """
    num_gpus = int(max_cluster_gpus())
    return 1 / math.ceil(num_processes / num_gpus) if num_gpus else 0.0


@contextmanager
def _silence_native_stderr() -> Iterator[None]:
    """Discard output to file descriptor 2 while Ray's C++ code prints its log level there.

    It affects every thread of the process, so the block contains only `ray.init`. Python exceptions are not affected.
    """
    sys.stderr.flush()
    saved_fd, null_fd = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_fd, 2)
    try:
        yield
    finally:
        os.dup2(saved_fd, 2)
        os.close(saved_fd)
        os.close(null_fd)


def _check_reachable(address: str) -> None:
    """Raise if nothing listens at `address`; Ray itself would retry for more than a minute."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from error


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
