"""The command that puts models behind HTTP."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bsq_ray.cli.options import AddressOption, OverridesArgument


def serve(
    model: Annotated[list[str], typer.Option(help="Model folder, or NAME=FOLDER; several times for several models.")],
    overrides: OverridesArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on, of the cluster's head.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    token: Annotated[
        bool | None,
        typer.Option(
            "--token/--no-token", help="Ask for a bearer token; default: unless --host is this machine's own."
        ),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Serve models: a page at /, the HTTP interface at /v1, its description at /docs.

    The token is that of the environment variable BSQ_RAY_TOKEN, of 16 characters or more, or a new one that is printed.
    """
    from bsq_ray.runtime.signals import stop_on_signal
    from bsq_ray.serving.server import parse_settings, serve_app

    settings = parse_settings(model, host, token, overrides or [])
    print(f"loading {', '.join(settings.models)}", file=sys.stderr)
    with serve_app(settings, host, port, address) as server, stop_on_signal() as stop_event:
        print(server.url, flush=True)
        if server.note:
            print(server.note, file=sys.stderr)
        if server.token is not None:
            print(f"token: {server.token}", flush=True)
        stop_event.wait()
