"""The web page, the API documentation and the files they load; they need no token."""

from __future__ import annotations

from html import escape
from importlib import resources

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.http.openapi import render_docs
from bsq_ray.serving.http.path_prefix import base_address

_MEDIA_TYPES = {"style.css": "text/css", "script.js": "text/javascript"}
# Scripts, styles and images load from this server or from the page itself only.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'self'; frame-ancestors 'none'; "
    "form-action 'none'"
)
router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    """Return the web page."""
    return _html_response(request, _read_page_file("index.html").decode())


@router.get("/page/{name}")
async def page_file(name: str) -> Response:
    """Return a script or style sheet of the page."""
    if name not in _MEDIA_TYPES:
        raise ApiError(404, "not found")
    return Response(_read_page_file(name), media_type=_MEDIA_TYPES[name], headers={"Cache-Control": "no-cache"})


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Return the OpenAPI schema."""
    app: FastAPI = request.app
    return JSONResponse(app.openapi())


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return the API documentation."""
    app: FastAPI = request.app
    return _html_response(request, render_docs(app.openapi()))


def _html_response(request: Request, html: str) -> Response:
    base = base_address(request)
    if base is not None:
        html = html.replace("<head>", f'<head><base href="{escape(base)}">', 1)
    headers = {"Content-Security-Policy": _CONTENT_SECURITY_POLICY, "Vary": "X-Forwarded-Prefix"}
    return HTMLResponse(html, headers=headers)


def _read_page_file(name: str) -> bytes:
    return (resources.files("bsq_ray.serving") / "page" / name).read_bytes()
