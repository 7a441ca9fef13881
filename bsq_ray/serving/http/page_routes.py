"""The web page, the API documentation and the files they load; they need no token."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from bsq_ray.serving.errors import ApiError
from bsq_ray.serving.http.openapi import render_docs

_MEDIA_TYPES = {"style.css": "text/css", "script.js": "text/javascript"}
# Scripts, styles and images load from this server or from the page itself only.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'none'"
)
router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    """Return the web page."""
    return _html_response(_read_page_file("index.html"))


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
    return _html_response(render_docs(app.openapi()).encode())


def _html_response(html: bytes) -> Response:
    return HTMLResponse(html, headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY})


def _read_page_file(name: str) -> bytes:
    return (resources.files("bsq_ray.serving") / "page" / name).read_bytes()
