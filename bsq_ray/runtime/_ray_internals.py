"""Every use of a private part of Ray, one function each.

Each docstring states why the function exists, the Ray version it was seen in and the public successor, if there is one.
tests/runtime/test_ray_internals.py holds one contract test per function (`pytest -m internals`).
The linter rejects private parts of Ray everywhere else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


def serve_http_callback_env() -> str:
    """Return the environment variable that names a function returning ASGI middlewares of Ray Serve's HTTP proxy.

    Why: limits on memory held by slow clients apply in the proxy. Seen in Ray 2.60, undocumented.
    Public: none; `serve.start(http_options=...)` accepts middlewares only as pickled objects, not on `serve deploy`.
    """
    return "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def disconnect_header() -> bytes:
    """Return the header by which a client asks that its request continues after it disconnects.

    Why: the proxy strips it, so that a disconnect always cancels the work. Seen in Ray 2.60. Public: none.
    """
    return b"x-request-disconnect-disabled"


def attach_receive_messages(receive: Any, messages: Callable[[Any], Awaitable[Any]]) -> bool:
    """Replace the source from which a replica fetches the rest of a request body.

    Why: a body that came with the request needs no second call to the proxy. Seen in Ray 2.60. Public: none.

    Args:
        receive: ASGI receive callable of a replica.
        messages: called with Ray's request metadata; returns pickled ASGI messages, or never returns.

    Returns:
        False if `receive` is not Ray's object; it is then left as it is.
    """
    if not hasattr(receive, "_receive_asgi_messages"):
        return False
    receive._receive_asgi_messages = messages
    return True


def head_node_resource() -> str:
    """Return the resource that only the head node of a cluster has.

    Why: the HTTP proxy's address is that of the head node. Seen in Ray 2.60.
    Public: the `is_head_node` field of `ray.util.state.list_nodes`, which needs a dashboard.
    """
    return "node:__internal_head__"
