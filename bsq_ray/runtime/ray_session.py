"""Starting or joining Ray, in one place, with the settings this package relies on."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Read by Ray when it is imported, so they are set before; what the user set stays.
_RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # Ray Data's pools of actors print a warning about their restarts that nobody can act on.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@contextmanager
def ray_session(
    address: str | None = None, num_cpus: int | None = None, include_dashboard: bool = False
) -> Iterator[str]:
    """Joins the cluster at `address`, or the one a job runs on, or starts a local one for the time of the block.

    Args:
        address: a cluster ("auto" or host:port); None starts a Ray of this machine alone, unless the process is
            already connected or runs inside `ray job submit`.
        cpus: logical CPUs of the Ray that is started; None is the number of cores, at least 4, because reading
            tasks must find room beside the workers.
        dashboard: whether the Ray that is started has one.

    Yields:
        The dashboard's address, empty where there is none.

    Raises:
        ValueError: no cluster answers at `address`.
    """
    for name, value in _RAY_ENV.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield _dashboard_url()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        try:
            with _silence_native_stderr():
                ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster answers at {address}: {error}") from error
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
        with _silence_native_stderr():
            ray.init(
                address="local",
                num_cpus=num_cpus or max(4, os.cpu_count() or 1),
                include_dashboard=include_dashboard,
                log_to_driver=False,
                logging_level="warning",
                object_store_memory=2**30,
            )
    try:
        if address:
            _start_ray_data_actors_on_driver_node()
        yield _dashboard_url()
    finally:
        ray.shutdown()


def _start_ray_data_actors_on_driver_node() -> None:
    """Lets Ray Data start its two book-keeping actors, which it does where it is used first and once per cluster.

    They outlive what started them. On a worker's machine they would keep the autoscaler from ever giving it back.
    """
    import ray

    ray.data.from_items([0]).map_batches(lambda batch: batch, num_cpus=0).materialize()


def _dashboard_url() -> str:
    import ray

    url = ray._private.worker._global_node.webui_url
    return f"http://{url}" if url and "://" not in url else url or ""


def max_cluster_resources() -> dict[str, float]:
    """What the cluster this process is connected to has, with what its autoscaler may still bring up."""
    import ray

    current = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(current.get(name, 0.0), float(limits.get(name, 0))) for name in current.keys() | limits.keys()}


def max_cluster_gpus() -> float:
    """Its GPUs."""
    return max_cluster_resources().get("GPU", 0.0)


def gpus_per_process(num_processes: int) -> float:
    """What of a GPU each of so many processes takes: a whole one, an even part where there are fewer GPUs, or none.

    To be asked for: a process to which Ray gives none sees all of its machine's and would take the first.
    """
    num_gpus = int(max_cluster_gpus())
    return 1 / math.ceil(num_processes / num_gpus) if num_gpus else 0.0


def max_cluster_cpus() -> float:
    """Its CPUs; infinitely many if nobody knows what its autoscaler may bring up."""
    return max_cluster_resources().get("CPU", 0.0) if cluster_limits_known() else math.inf


def cluster_limits_known() -> bool:
    """Whether it cannot become larger than `resources_within_reach`.

    Known of a Ray that this process has started, and where the autoscaler says what it may bring up. Those of `ray up`
    and KubeRay do not.
    """
    import ray

    started_here: bool = ray._private.worker._global_node.head
    return started_here or ray._private.state.state.get_max_resources_from_cluster_config() is not None


@contextmanager
def _silence_native_stderr() -> Iterator[None]:
    """Ray's C++ part announces its log level on the descriptor itself; what Python raises is not touched."""
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
    """Ray itself would try for more than a minute."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster answers at {address}: {error}") from error


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
