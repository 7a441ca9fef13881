"""Start a local Ray instance or connect to a cluster, with the settings this package requires."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bsq_ray.runtime._ray_internals import autoscaler_limits, job_config_without_folder
from bsq_ray.runtime.ray_errors import translate_ray_errors

# Ray reads these variables when it is imported, so they are set before. Values set by the user take precedence.
_RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # training/ray_trainer.py resizes the worker group when a node is drained; Ray's own watcher would end the run.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # Actor pools of Ray Data log warnings about restarts that are not actionable.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Variables that contain folders. They are made absolute, because Ray's processes have other working folders.
_FOLDER_VARIABLES = ("BSQ_RAY_CACHE", "BSQ_RAY_WEIGHTS", "RAY_TMPDIR", "TMPDIR", "WANDB_DIR")
_CONNECT_TIMEOUT_S = 10
# Set by `ray job submit`, which runs the job in a copy of its working folder.
_SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Paths of Unix domain sockets have at most 107 bytes. Ray's are FOLDER/ray/session_DATE_TIME_PID/sockets/plasma_store.
_MAX_TEMP_FOLDER_BYTES = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
_SHORT_TEMP_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class _Connection:
    """Connection of this process to Ray, made by `ray_session`.

    Attributes:
        dashboard_url: URL of the dashboard; empty if there is none.
        is_local: True if `ray_session` started a local Ray instance.
    """

    dashboard_url: str
    is_local: bool


# Ray connects a process, not a thread, so there is at most one.
_connection: _Connection | None = None


@contextmanager
def ray_session(
    address: str | None = None, num_cpus: int | None = None, include_dashboard: bool = False
) -> Iterator[str]:
    """Connect to a cluster, or start a local Ray instance, for the duration of the block.

    Args:
        address: a cluster ("auto" or host:port). None uses RAY_ADDRESS, which `ray job submit` sets, or starts a local
            instance. A process that is already connected keeps its connection.
        num_cpus: logical CPUs of a local instance. None is the number of cores, at least 4, because data tasks need a
            CPU in addition to those of the workers.
        include_dashboard: start a dashboard with a local instance.

    Yields:
        URL of the dashboard; empty if there is none, or if other code has connected this process.

    Raises:
        ValueError: no Ray cluster responds at `address`.
        RuntimeError: Ray cannot start on this node, or a worker died in the block.
        Exception: the error of a task or actor that failed in the block, see `translate_ray_errors`.
    """
    global _connection
    for name, value in _RAY_ENV.items():
        os.environ.setdefault(name, value)
    for name in _FOLDER_VARIABLES:
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(os.environ[name]))
    import ray

    if ray.is_initialized():
        with translate_ray_errors():
            yield _connection.dashboard_url if _connection else ""
        return
    if not address and (address := os.environ.get("RAY_ADDRESS")):
        # The command line does not contain the address.
        print(f"connecting to Ray at {address}, the value of RAY_ADDRESS", file=sys.stderr, flush=True)
    context = _connect(address) if address else _start_local(num_cpus, include_dashboard)
    try:
        if address:
            _start_ray_data_actors_on_driver_node()
        _connection = _Connection(_with_scheme(context.dashboard_url), is_local=not address)
        with translate_ray_errors():
            yield _connection.dashboard_url
    finally:
        _connection = None
        ray.shutdown()


def _connect(address: str) -> Any:
    import ray

    _check_reachable(address)
    try:
        with _silence_native_stderr():
            return ray.init(
                address=address, log_to_driver=False, logging_level=logging.WARNING, job_config=_job_config()
            )
    except Exception as error:
        raise ValueError(f"no Ray cluster responds at {address}: {_one_line(error)}") from error


def _start_local(num_cpus: int | None, include_dashboard: bool) -> Any:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    folder, short_folder = _temp_folders()
    options: dict[str, Any] = {}
    if folder != short_folder:
        # Objects are spilled to the user's folder, which may be on a larger disk than the short one.
        options = {"_temp_dir": f"{short_folder}/ray", "object_spilling_directory": folder}
    try:
        with _silence_native_stderr():
            return ray.init(
                address="local",
                num_cpus=num_cpus or max(4, os.cpu_count() or 1),
                include_dashboard=include_dashboard,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=2**30,
                job_config=_job_config(),
                **options,
            )
    except Exception as error:
        ray.shutdown()
        raise RuntimeError(
            f"Ray cannot start on this node: {_one_line(error)}; read its logs in {short_folder}/ray/session_latest, "
            "or choose another folder with RAY_TMPDIR"
        ) from error


def _temp_folders() -> tuple[str, str]:
    """Return the folder for temporary files, and a folder whose path is short enough for Ray's sockets.

    Raises:
        ValueError: the path in RAY_TMPDIR is too long, or no folder with a short path is writable.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(folder)) <= _MAX_TEMP_FOLDER_BYTES:
        return folder, folder
    short_folders = (path for path in _SHORT_TEMP_FOLDERS if os.access(path, os.W_OK | os.X_OK))
    short_folder = None if "RAY_TMPDIR" in os.environ else next(short_folders, None)
    if short_folder is None:
        raise ValueError(
            f"the path {folder} is too long for the sockets of Ray; set RAY_TMPDIR to a folder with a path of at most "
            f"{_MAX_TEMP_FOLDER_BYTES} bytes"
        )
    return folder, short_folder


def _job_config() -> Any:
    """Return the configuration of this process's job; None for Ray's default.

    Workers import modules from the working folder only if this process does, as in `python -m`.
    """
    folder = os.path.abspath(os.curdir)
    if _SUBMITTED_JOB_VARIABLE in os.environ or folder in map(os.path.abspath, sys.path):
        return None
    return job_config_without_folder(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _start_ray_data_actors_on_driver_node() -> None:
    """Run an empty pipeline, so that Ray Data starts its statistics and autoscaling actors on this node.

    Ray Data starts them once per cluster, on the first node that uses it, and they outlive the job. On a worker node
    they would prevent the autoscaler from removing the node.
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
    """Return the number of GPUs of the cluster, including those that its autoscaler is known to be able to add."""
    return max_cluster_resources().get("GPU", 0.0)


def max_cluster_cpus() -> float:
    """Return the maximum number of CPUs that the cluster can have, or inf if the autoscaler's limits are unknown."""
    return max_cluster_resources().get("CPU", 0.0) if has_known_cluster_limits() else math.inf


def has_known_cluster_limits() -> bool:
    """Return True if the cluster can never exceed `max_cluster_resources`.

    This holds for a local instance started by `ray_session`, and if the autoscaler publishes its limits. The
    autoscalers of `ray up` and KubeRay do not publish them.
    """
    return (_connection is not None and _connection.is_local) or autoscaler_limits() is not None


def gpus_per_process(num_processes: int) -> float:
    """Return the number of GPUs per process: 1, a fraction if processes share GPUs, or 0 on a cluster without GPUs.

    A process that requested no GPU would see all GPUs of its node and use the first one.
    """
    num_gpus = int(max_cluster_gpus())
    return 1 / math.ceil(num_processes / num_gpus) if num_gpus else 0.0


@contextmanager
def _silence_native_stderr() -> Iterator[None]:
    """Discard output to file descriptor 2 while Ray's C++ code prints its log level there.

    All threads of the process are affected, so the block contains only `ray.init`. Python exceptions are still raised.
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
    """Raise ValueError if nothing listens at `address`; Ray itself would retry for more than a minute."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster responds at {address}: {error}") from error


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
