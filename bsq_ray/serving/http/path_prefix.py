"""Requests as other software sends them: HEAD, trailing slashes, and path prefixes of reverse proxies.

    browser ─/user/me/proxy/8000/docs─▶ reverse proxy ─/docs─▶ service

The service does not know its public address, so everything it returns is relative: links, redirects and the servers of
the OpenAPI schema.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A path of an absolute URL, without characters that could end an HTML attribute or start another host.
_PREFIX_PATTERN = re.compile(r"(/[A-Za-z0-9._~%@:+-]+)+")


class HeadMiddleware:
    """Responds to HEAD as to GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                if message.get("more_body", False):
                    return
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)


class RelativeRedirectMiddleware:
    """Redirects `/path/` to `/path`, and a prefix without its slash to the page, by relative addresses.

    Starlette's own redirects contain the host and the path that the service sees, which clients of a proxy cannot use.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        location = _redirect_location(scope) if scope["type"] == "http" else None
        if location is None:
            await self._app(scope, receive, send)
            return
        query = scope.get("query_string", b"").decode("latin-1")
        # 307 keeps the method and the body.
        await RedirectResponse(f"{location}?{query}" if query else location, 307)(scope, receive, send)


def _redirect_location(scope: Scope) -> str | None:
    route_path = get_route_path(scope)
    if not route_path and scope["path"]:
        return f"./{scope['path'].rsplit('/', 1)[-1]}/"
    path = route_path.removesuffix("/")
    # Clients disagree on relative addresses where slashes are repeated.
    if path in ("", route_path) or path.endswith("/"):
        return None
    return f"../{path.rsplit('/', 1)[-1]}"


def base_address(request: Request) -> str | None:
    """Return the public path of the page that a proxy announces in X-Forwarded-Prefix, or None.

    With it the page's relative links also work if the proxy passes `/prefix` on without its trailing slash.
    """
    header = Headers(scope=request.scope).get("x-forwarded-prefix", "")
    # Several proxies append their prefixes, the outermost one first.
    prefix = "".join(part.strip().rstrip("/") for part in header.split(","))
    if not _PREFIX_PATTERN.fullmatch(prefix):
        return None
    return f"{prefix}{request.scope.get('root_path', '')}/"
