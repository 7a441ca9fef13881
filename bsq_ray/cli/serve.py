"""Command `bsq-ray serve`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bsq_ray.cli.options import AddressOption, OverridesArgument


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder or NAME=FOLDER. Repeat for several models. Default: all models of the package."
        ),
    ] = None,
    overrides: OverridesArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on, on the head node.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 selects a free one.")] = 8000,
    token: Annotated[
        bool | None,
        typer.Option(
            "--token/--no-token", help="Require a bearer token. Default: only if --host is not a loopback address."
        ),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Serve models over HTTP: a web page at /, the API at /v1, its documentation at /docs.

    The URL is printed when all models are loaded; /healthz responds before.
    The token is the value of BSQ_RAY_TOKEN (at least 16 characters), or a new one that is printed.
    """
    from bsq_ray.runtime.signals import stop_on_signal
    from bsq_ray.serving.server import ServerHandle, parse_settings, serve_app, shipped_model_options

    settings = parse_settings(model or shipped_model_options(), host, require_token=token, overrides=overrides or [])

    def report_start(server: ServerHandle) -> None:
        print(f"loading {', '.join(settings.models)}; {server.url}healthz reports progress", file=sys.stderr)
        if server.note:
            print(server.note, file=sys.stderr)

    print("starting the service", file=sys.stderr)
    with (
        serve_app(settings, host, port, address=address, on_started=report_start) as server,
        stop_on_signal() as stop_event,
    ):
        print(server.url, flush=True)
        if server.token is not None:
            print(f"token: {server.token}", flush=True)
        stop_event.wait()
