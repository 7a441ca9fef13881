"""`bsq-ray serve`: the service on this machine or a cluster, until it is stopped."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

from bsq_ray import model_folder
from bsq_ray.config.loader import validate_mapping
from bsq_ray.runtime.ray_session import ray_session
from bsq_ray.serving.http.admission import is_loopback
from bsq_ray.serving.service_config import TOKEN_VARIABLE, Settings, token_from_environment

# Read by Ray Serve's processes when they start. Replicas call models in threads of their own, so the event loop is
# free and a request need not change threads on its way.
_SERVE_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "bsq_ray.serving.http.response_backpressure.middlewares",
    # Requests between the processes of a machine are small and many.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Threads that wait for more to compute soon leave the cores to those who read requests and files; at once would
    # cost more than it gives, for they are woken dozens of times in each forward pass.
    "GOMP_SPINCOUNT": "30000",
}
# A line in a file for every request takes longer than what it tells is worth; `/metrics` counts them.
_LOGGING_CONFIG = {"enable_access_log": False}


@dataclass(frozen=True)
class ServerHandle:
    """A service that answers.

    Attributes:
        url: of the page.
        token: what requests must carry; None if there is no authentication.
        note: how to reach it from here, where the URL alone does not say.
    """

    url: str
    token: str | None
    note: str = ""


def parse_settings(models: Sequence[str], host: str, require_token: bool | None, overrides: Sequence[str]) -> Settings:
    """Settings for models given as FOLDER or NAME=FOLDER.

    Args:
        token: whether requests need a token; None: unless only this machine can reach `host`.

    Raises:
        ValueError: a folder cannot be read, two models have one name, or an override is wrong.
    """
    folders_by_name: dict[str, str] = {}
    for text in models:
        name, separator, url = text.partition("=")
        if not separator:
            name, url = model_folder.load_model_folder_config(text).name, text
        if name in folders_by_name:
            raise ValueError(f"two models are called {name}; give one another name: --model OTHER={url}")
        folders_by_name[name] = url
    authentication = not is_loopback(host) if require_token is None else require_token
    return validate_mapping(
        {"models": folders_by_name, "authentication": authentication}, overrides, Settings, "bsq-ray serve"
    )


@contextmanager
def serve_app(settings: Settings, host: str, port: int, address: str | None = None) -> Iterator[ServerHandle]:
    """The service, loaded and answering, for the time of the block.

    Args:
        port: of the cluster's head, which listens; 0 takes a free one, if that is this machine.
        address: Ray cluster, see `ray_session`.

    Raises:
        ValueError: the token in the environment is too short, the port is taken, a model folder cannot be read, or the
            cluster serves already.
        RuntimeError: a replica did not start.
    """
    token = _read_or_create_token() if settings.authentication else None
    for name, value in _SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with ray_session(address):
        from ray import serve

        from bsq_ray.serving.app import application

        app = application(settings, token, is_loopback(host))
        if serve.status().proxies:
            # Its port would stay as it is, and the end of this service would be the end of all.
            raise ValueError(
                "Ray Serve already runs on this cluster; add the models to what it serves (cluster/README.md, "
                "'Serving'), or leave --address out"
            )
        endpoint = _resolve_endpoint(host, port)
        try:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(
                http_options={"host": host, "port": endpoint.port},
                proxy_location="HeadOnly",
                logging_config=_LOGGING_CONFIG,
            )
            serve.run(app, name="bsq", route_prefix="/", logging_config=_LOGGING_CONFIG)
            yield ServerHandle(endpoint.url, token, endpoint.note)
        finally:
            # Ray reports the end of Serve's controller, which was asked for, as a failure.
            with open(os.devnull, "w") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
                serve.shutdown()


def _read_or_create_token() -> str:
    return token_from_environment() if os.environ.get(TOKEN_VARIABLE) else secrets.token_urlsafe(24)


@dataclass(frozen=True)
class _Endpoint:
    port: int
    url: str
    note: str


def _resolve_endpoint(host: str, port: int) -> _Endpoint:
    """Where the service listens: on the head of the cluster that this process has joined."""
    import ray

    [head] = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        port = _free_port(host, port)
        return _Endpoint(port, f"http://{_url_host(host)}:{port}/", "")
    if not port:
        raise ValueError("--port 0 looks for a free port here, but the cluster's head is another machine; choose one")
    address = head["NodeManagerAddress"]
    if is_loopback(host):
        tunnel = f"ssh -N -L {port}:{_url_host(host)}:{port} {address}"
        note = (
            f"only the cluster's head {address} reaches this address: `{tunnel}` brings it here, --host 0.0.0.0 opens "
            "it to others"
        )
        return _Endpoint(port, f"http://{_url_host(host)}:{port}/", note)
    public_host = address if host in ("0.0.0.0", "::") else host
    return _Endpoint(port, f"http://{_url_host(public_host)}:{port}/", f"the cluster's head {address} listens")


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
