"""OpenAPI descriptions of bodies and errors, and the page `/docs` that is rendered from the schema.

FastAPI generates `/openapi.json` from routes and schemas. Only files are described here, because they have no schema.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from pydantic import BaseModel

from bsq_ray.serving.http.schemas import ErrorBody

_BINARY_SCHEMA = {"type": "string", "format": "binary"}
Content = dict[str, dict[str, Any]]


def file_content(*media_types: str) -> Content:
    """Return the description of a body that is a file of one of these media types."""
    return {media_type: {"schema": _BINARY_SCHEMA} for media_type in media_types}


def json_content(body_type: type[BaseModel], media_type: str = "application/json") -> Content:
    """Return the description of a JSON body."""
    return {media_type: {"schema": body_type.model_json_schema()}}


def request_body(content: Content) -> dict[str, Any]:
    """Return the description of a body that the route reads itself, as argument `openapi_extra` of the route."""
    return {"requestBody": {"required": True, "content": content}}


def success(content: Content) -> dict[int | str, dict[str, Any]]:
    """Return the description of a successful response without a schema, as argument `responses` of the route."""
    return {200: {"description": "success", "content": content}}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the descriptions of error responses; without arguments, of all."""
    return {
        status: {"model": ErrorBody, "description": description}
        for status, description in _ERROR_DESCRIPTIONS.items()
        if not statuses or status in statuses
    }


_ERROR_DESCRIPTIONS = {
    401: "the bearer token is missing or wrong",
    403: "the service has no token, and the request names another host than this node",
    404: "unknown model",
    413: "too many bytes, or too many pixels in all frames",
    415: "another kind of file than expected, or an unsupported Content-Encoding",
    422: "damaged file or invalid value",
    429: "too many requests in progress, or too many responses being read; retry after Retry-After seconds",
    503: "models are loading, or the request timed out",
}


# Swagger UI is not used: FastAPI loads its scripts from a CDN, which the content security policy blocks, and no package
# of this project's dependencies contains them. This page needs no scripts.
def render_docs(schema: dict[str, Any]) -> str:
    """Render an OpenAPI schema as an HTML page, whose links are relative."""
    sections = "".join(
        _render_route(method, path, route)
        for path, routes in schema["paths"].items()
        for method, route in routes.items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<title>bsq_ray: HTTP API</title><link rel="stylesheet" href="page/style.css"></head><body class="docs">'
        '<main><h1>HTTP API</h1><p>Machine-readable: <a href="openapi.json">openapi.json</a>. Files are sent as raw '
        f"request bodies.</p>{sections}</main></body></html>"
    )


def _render_route(method: str, path: str, route: dict[str, Any]) -> str:
    request_types = ", ".join(route.get("requestBody", {}).get("content", {})) or "nothing"
    response_types = ", ".join(route["responses"]["200"]["content"])
    error_items = "".join(
        f"<li>{status}: {escape(response['description'])}</li>"
        for status, response in route["responses"].items()
        if status != "200"
    )
    description = re.sub("`(.+?)`", r"<code>\1</code>", escape(route.get("description", "")))
    errors = f"<details><summary>Errors</summary><ul>{error_items}</ul></details>" if error_items else ""
    return (
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route['summary'])}. "
        f"{description}</p>"
        f"<p>Accepts {escape(request_types)}; returns {escape(response_types)}.</p>{errors}</section>"
    )
