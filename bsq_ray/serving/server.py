"""The lifecycle of `bsq-ray serve`: start the service on a local or an existing Ray cluster, and shut it down."""

from __future__ import annotations

import logging
import os
import posixpath
import secrets
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from http.client import HTTPException

from bsq_ray import model_folder, storage
from bsq_ray.config.loader import validate_mapping
from bsq_ray.runtime._ray_internals import head_node_resource, serve_http_callback_env
from bsq_ray.runtime.ray_session import has_known_cluster_limits, max_cluster_resources, ray_session
from bsq_ray.serving.deployment_plan import ServicePlan, missing_capacity, plan_service
from bsq_ray.serving.http.admission import is_loopback
from bsq_ray.serving.service_config import (
    MODEL_NAME_PATTERN,
    PREFETCH_BODIES_VARIABLE,
    TOKEN_VARIABLE,
    Settings,
    token_from_environment,
)
from bsq_ray.shipped_models.catalog import DEFAULT_CODEC, describe_shipped_models, list_shipped_models

# Ray Serve's processes read these when they start. A variable that is already set keeps its value.
_SERVE_ENVIRONMENT = {
    # Replicas call models in their own threads, so the event loop is free and requests need not change threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    serve_http_callback_env(): "bsq_ray.serving.http.response_backpressure.middlewares",
    # Requests between the processes of a node are small and many.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # OpenMP threads without work spin for a short time and then free their cores for threads that read requests. Not
    # spinning at all would be slower, because each forward pass wakes them dozens of times.
    "GOMP_SPINCOUNT": "30000",
}
_APPLICATION = "bsq"
_POLL_INTERVAL_S = 0.1
# Time for the ingress to ask running replicas for the metadata of their models.
_LOAD_TIMEOUT_S = 60.0
_log = logging.getLogger("bsq_ray.serving")
# Logging every request to a file costs time; `/metrics` counts requests.
_LOGGING_CONFIG = {"enable_access_log": False}


@dataclass(frozen=True)
class ServerHandle:
    """A running service.

    Attributes:
        url: URL of the page.
        token: bearer token that requests must carry; None without authentication.
        note: how to reach the service from this node, where the URL alone is not enough.
    """

    url: str
    token: str | None
    note: str = ""


def parse_settings(
    models: Sequence[str], host: str, *, require_token: bool | None = None, overrides: Sequence[str] = ()
) -> Settings:
    """Return the settings for models given as FOLDER or NAME=FOLDER; an existing path is a FOLDER.

    Args:
        require_token: requests need a token; None requires one unless `host` is a loopback address.

    Raises:
        ValueError: a folder cannot be read, two models have the same name, or an override is invalid.
    """
    folders_by_name: dict[str, str] = {}
    for text in models:
        name, url = _split_name(text)
        url = model_folder.absolute_url(url)
        name = model_folder.load_model_folder_config(url).name if name is None else name
        if name in folders_by_name:
            raise ValueError(f"two models are named {name}; rename one of them: --model OTHER={url}")
        folders_by_name[name] = url
    authentication = not is_loopback(host) if require_token is None else require_token
    return validate_mapping(
        {"models": folders_by_name, "authentication": authentication}, overrides, Settings, "bsq-ray serve"
    )


def shipped_model_options() -> list[str]:
    """Return all shipped models as NAME=FOLDER. The default codec is first, so it serves requests without a model.

    Raises:
        ValueError: this version ships no models.
    """
    models = sorted(list_shipped_models(), key=lambda model: (model.name != DEFAULT_CODEC, model.name))
    if not models:
        raise ValueError(f"{describe_shipped_models()}; name a model folder with --model")
    return [f"{model.name}={model.folder}" for model in models]


def _split_name(text: str) -> tuple[str | None, str]:
    """Split NAME=FOLDER; the name is None if the text is a folder, whose path may contain "=" itself."""
    name, separator, url = text.partition("=")
    if not separator or storage.is_url(text) or storage.exists(text):
        return None, text
    folder = posixpath.dirname(text)
    if "=" in folder and storage.exists(folder):
        # A mistyped path in an existing folder is reported as a whole.
        return None, text
    # An invalid name of an existing folder is reported as such.
    is_named = bool(MODEL_NAME_PATTERN.fullmatch(name)) or storage.exists(url)
    return (name, url) if is_named else (None, text)


@contextmanager
def serve_app(
    settings: Settings,
    host: str,
    port: int,
    *,
    address: str | None = None,
    on_started: Callable[[ServerHandle], None] = lambda _: None,
) -> Iterator[ServerHandle]:
    """Run the service while the block runs; it starts when all replicas have loaded their models.

    Args:
        port: port on the head node; 0 selects a free one if this process runs on the head node.
        address: Ray cluster, see `ray_session`.
        on_started: called when `/healthz` responds, while the models are loading.

    Raises:
        ValueError: the token in the environment is too short, the port is in use, a model folder cannot be read, the
            replicas do not fit on the cluster, or Ray Serve already runs on it.
        RuntimeError: a replica did not start.
    """
    token = _read_or_create_token() if settings.authentication else None
    for name, value in _SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[PREFETCH_BODIES_VARIABLE] = str(int(settings.ingress.prefetch_bodies))
    plan = plan_service(settings)
    with ray_session(address):
        from ray import serve

        from bsq_ray.serving.app import application

        if serve.status().proxies:
            # The port of a running proxy cannot change, and shutting down this service would end all applications.
            raise ValueError(
                "Ray Serve already runs on this cluster; add the models to its configuration "
                "(docs/guides/cluster.md, 'Serving'), or omit --address"
            )
        capacity_note = _check_capacity(plan, settings)
        app = application(settings, plan, token=token, loopback_only=is_loopback(host))
        endpoint = _resolve_endpoint(host, port)
        handle = ServerHandle(endpoint.url, token, "; ".join(filter(None, (endpoint.note, capacity_note))))
        try:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(
                http_options={"host": host, "port": endpoint.port},
                proxy_location="HeadOnly",
                logging_config=_LOGGING_CONFIG,
            )
            target = serve.RunTarget(app, name=_APPLICATION, route_prefix="/", logging_config=_LOGGING_CONFIG)
            serve.run_many([target], wait_for_applications_running=False)
            _wait_until_running(lambda: on_started(handle))
            if endpoint.is_local:
                _wait_until_loaded(endpoint.port, host)
            yield handle
        finally:
            # Ray reports the requested end of Serve's controller as a failure, so its output is discarded.
            with open(os.devnull, "w") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
                serve.shutdown()


def _check_capacity(plan: ServicePlan, settings: Settings) -> str:
    """Return a note if the cluster has to grow before all replicas start.

    Raises:
        ValueError: the cluster can never have the capacity.
    """
    missing = missing_capacity(plan.resources(settings), max_cluster_resources())
    if missing and has_known_cluster_limits():
        raise ValueError(missing)
    return missing and f"waiting for the cluster to grow: {missing}"


def _wait_until_running(on_started: Callable[[], None]) -> None:
    """Wait until all replicas run; call `on_started` when the ingress does.

    Raises:
        RuntimeError: a replica did not start.
    """
    from ray import serve

    is_started = False
    while True:
        application = serve.status().applications[_APPLICATION]
        if not is_started and application.deployments["ingress"].status == "HEALTHY":
            is_started = True
            on_started()
        if application.status == "RUNNING":
            return
        if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RuntimeError(f"the service did not start: {application.message}")
        time.sleep(_POLL_INTERVAL_S)


def _wait_until_loaded(port: int, host: str) -> None:
    """Wait until the ingress has the metadata of all models, whose replicas are running."""
    # This node can reach each address at which the head node listens, if it is the head node.
    local_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    # Ignore HTTP proxies of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{_url_host(local_host)}:{port}/healthz"
    expires_at = time.monotonic() + _LOAD_TIMEOUT_S
    while time.monotonic() < expires_at:
        with suppress(OSError, HTTPException), opener.open(url, timeout=_LOAD_TIMEOUT_S):
            return
        time.sleep(_POLL_INTERVAL_S)
    _log.warning("models are still loading after %.0f s; %s reports progress", _LOAD_TIMEOUT_S, url)


def _read_or_create_token() -> str:
    return token_from_environment() if os.environ.get(TOKEN_VARIABLE) else secrets.token_urlsafe(24)


@dataclass(frozen=True)
class _Endpoint:
    """Address of the service; `is_local` if this node listens."""

    port: int
    url: str
    note: str
    is_local: bool = False


def _resolve_endpoint(host: str, port: int) -> _Endpoint:
    """Return the address at which the head node of the connected cluster listens."""
    import ray

    [head] = [node for node in ray.nodes() if node["Alive"] and head_node_resource() in node["Resources"]]
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        port = _free_port(host, port)
        return _Endpoint(port, f"http://{_url_host(host)}:{port}/", "", is_local=True)
    if not port:
        raise ValueError("--port 0 needs the head node on this node, but it is another one; choose a port")
    address = head["NodeManagerAddress"]
    if is_loopback(host):
        tunnel = f"ssh -N -L {port}:{_url_host(host)}:{port} {address}"
        note = (
            f"only the head node {address} can reach this address; forward it with `{tunnel}`, or use --host 0.0.0.0 "
            "to open it to other nodes"
        )
        return _Endpoint(port, f"http://{_url_host(host)}:{port}/", note)
    public_host = address if host in ("0.0.0.0", "::") else host
    return _Endpoint(port, f"http://{_url_host(public_host)}:{port}/", f"the head node {address} listens")


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _free_port(host: str, port: int) -> int:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            bound_port: int = probe.getsockname()[1]
            return bound_port
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from error
