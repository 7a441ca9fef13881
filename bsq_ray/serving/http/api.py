"""The HTTP interface: routes, what bodies and answers look like, and what is said when something is wrong.

It knows nothing of Ray: it is given the models, whose replicas may be anywhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import Field, ValidationError
from starlette.exceptions import HTTPException

from bsq_ray.config.tokenizer_config import StrictModel
from bsq_ray.serving.errors import ApiError, deadline_exceeded
from bsq_ray.serving.generation import IMAGE_MEDIA_TYPES, GenerateBody, generate_images, image_media_type, ndjson_lines
from bsq_ray.serving.http.admission import AdmissionControl
from bsq_ray.serving.http.body_prefetch import PrefetchedBodyMiddleware
from bsq_ray.serving.http.openapi import render_html, route_options
from bsq_ray.serving.media.video_io import MKV, MP4, negotiate_media_type
from bsq_ray.serving.payloads import MediaFile, PackedTokens
from bsq_ray.serving.registry import ModelRegistry, ServedModel
from bsq_ray.serving.service_config import Limits

_log = logging.getLogger("bsq_ray.serving")
_PAGE_MEDIA_TYPES = {"style.css": "text/css", "script.js": "text/javascript"}
# Frames per second of tokens that do not say so.
_DEFAULT_FRAME_RATE = "25"
# Scripts, styles and pictures come from this server or from the page itself, and from nowhere else.
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'none'"
)
# Content types that are certainly not a file of the kind that is wanted.
_REJECTED_CONTENT_TYPES = ("multipart/", "text/", "application/json", "application/xml")
# Seconds before a model is loaded again that failed otherwise than by not being there yet.
_LOAD_RETRY_DELAY_S = 5.0


class TokensBody(StrictModel):
    """Tokens of one image, or of a clip at a rate of frames per second, as `encode` answers."""

    model: str | None = None
    grid: tuple[int, int, int]
    bits: int
    rate: str | None = Field(None, pattern=r"^[1-9]\d{0,9}(/[1-9]\d{0,9})?$")
    packed: str

    def to_packed_tokens(self) -> PackedTokens:
        """What a replica takes.

        Raises:
            Refused: 422 they are not base64.
        """
        try:
            packed = base64.b64decode(self.packed, validate=True)
        except (binascii.Error, ValueError):
            raise ApiError(422, "packed: not base64") from None
        rate = self.rate or (_DEFAULT_FRAME_RATE if self.grid[0] > 1 else None)
        return PackedTokens(list(self.grid), packed, rate)


def create_app(
    models: ModelRegistry,
    limits: Limits,
    token_hash: str | None,
    loopback_only: bool,
    collect_metrics: Callable[[], Awaitable[str]],
) -> FastAPI:
    """The application.

    Args:
        models: they are loaded while the application already answers.
        token_digest, loopback: see `Guard`.
        metrics: the text of `/metrics`.
    """
    admission = AdmissionControl(limits, token_hash, loopback_only)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_load_until_ready(model)) for model in models]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="bsq_ray", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(PrefetchedBodyMiddleware)

    @app.exception_handler(ApiError)
    async def handle_api_error(_: Request, error: ApiError) -> JSONResponse:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status in (408, 413):
            # What is still on its way will not be read.
            headers["Connection"] = "close"
        return JSONResponse({"error": error.message}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def handle_http_exception(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail).lower()}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def handle_unexpected_error(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return JSONResponse({"error": "the service failed; its log says why"}, 500)

    async def run_on_upload(capability: str, name: str | None, data: bytes, *arguments: Any) -> tuple[ServedModel, Any]:
        target = models.model_for_upload(data, capability, name)
        return target, await with_timeout(
            limits.request_timeout_s, target.replicas_for(capability).call(capability, data, *arguments)
        )

    @app.post("/v1/encode", **route_options("encode"))
    async def encode(request: Request, model: str | None = None) -> Response:
        async with admitted_body(request, "encode") as data:
            target, tokens = await run_on_upload("encode", model, data)
        rate_field = {} if tokens.rate is None else {"rate": tokens.rate}
        packed = base64.b64encode(tokens.packed).decode()
        fields = {"model": target.name, "grid": tokens.grid, "bits": target.metadata["bits"]}
        return JSONResponse({**fields, **rate_field, "packed": packed})

    @app.post("/v1/decode", **route_options("decode"))
    async def decode(request: Request) -> Response:
        async with admitted_body(request, "decode") as data:
            body = _parse_body(TokensBody, data)
            target = models.choose("decode", body.model)
            replicas = target.replicas_for("decode")
            if body.bits != target.metadata["bits"]:
                raise ApiError(422, f"bits: tokens of this model have {target.metadata['bits']}")
            file = await with_timeout(
                limits.request_timeout_s, replicas.call("decode", body.tokens(), _video_media_type(request, MP4))
            )
        return _file_response(file, {"X-Model": target.name})

    @app.post("/v1/reconstruct", **route_options("reconstruct"))
    async def reconstruct(request: Request, model: str | None = None) -> Response:
        async with admitted_body(request, "reconstruct") as data:
            target, file = await run_on_upload("reconstruct", model, data, _video_media_type(request, MP4))
        return _file_response(
            file, {"X-Model": target.name, **_bits_per_pixel_header(target.metadata["bits_per_pixel"])}
        )

    @app.post("/v1/compress", **route_options("compress"))
    async def compress(request: Request, model: str | None = None) -> Response:
        async with admitted_body(request, "compress") as data:
            target, file = await run_on_upload("compress", model, data)
        name = "image" if file.frames is None else "clip"
        headers = {"X-Model": target.name, "Content-Disposition": f'attachment; filename="{name}.bsq"'}
        return _file_response(file, {**headers, **_bits_per_pixel_header(8 * len(file.data) / file.pixels)})

    @app.post("/v1/decompress", **route_options("decompress"))
    async def decompress(request: Request, model: str | None = None) -> Response:
        async with admitted_body(request, "decompress") as data:
            target = models.model_for_bsq(data, model)
            call = target.replicas_for("decompress").call("decompress", data, _video_media_type(request, MKV))
            file = await with_timeout(limits.request_timeout_s, call)
        return _file_response(file, {"X-Model": target.name, **_bits_per_pixel_header(8 * len(data) / file.pixels)})

    @app.post("/v1/measure", **route_options("measure"))
    async def measure(request: Request, model: str | None = None) -> Response:
        async with admitted_body(request, "measure") as data:
            target, report = await run_on_upload("measure", model, data)
        return JSONResponse({"model": target.name, **report})

    @app.post("/v1/generate", **route_options("generate"))
    async def generate(request: Request) -> Response:
        async with authenticated_body(request) as data:
            body = _parse_body(GenerateBody, data)
        images = generate_images(body, models, admission, limits.request_timeout_s)
        # The first one tells what is wrong with a request, while the answer has not begun.
        image = await anext(images)
        target = models.choose("generate", body.model)
        if any(kind in request.headers.get("accept", "") for kind in IMAGE_MEDIA_TYPES):
            async for next_image in images:
                image = next_image
            return Response(image, media_type=image_media_type(target.kind), headers={"X-Seed": str(body.seed)})
        steps, kind = body.steps or target.metadata["steps"], image_media_type(target.kind)
        return StreamingResponse(ndjson_lines(image, images, body, steps, kind), media_type="application/x-ndjson")

    @asynccontextmanager
    async def authenticated_body(request: Request) -> AsyncIterator[bytes]:
        admission.authenticate(request)
        async with admission.read_body(request) as data:
            yield data

    @asynccontextmanager
    async def admitted_body(request: Request, capability: str) -> AsyncIterator[bytes]:
        content_type = request.headers.get("content-type", "").lower()
        if capability != "decode" and content_type.startswith(_REJECTED_CONTENT_TYPES):
            raise ApiError(
                415, f"send the file itself as the body (curl --data-binary @FILE), not {content_type.split(';')[0]}"
            )
        async with authenticated_body(request) as data:
            if not data:
                raise ApiError(422, "the body is empty")
            with admission.slot():
                yield data

    @app.get("/v1/models", **route_options("models"))
    async def list_models(request: Request) -> Response:
        admission.authenticate(request)
        return JSONResponse({"models": models.to_json()})

    @app.get("/healthz", **route_options("healthz"))
    async def healthz() -> Response:
        loading_models = models.loading
        if loading_models:
            return JSONResponse({"status": "loading", "models": loading_models}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", **route_options("metrics"))
    async def prometheus_metrics(request: Request) -> Response:
        admission.authenticate(request)
        return Response(await collect_metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(render_html(app.openapi()), headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(
            _read_page_file("index.html"), headers={"Content-Security-Policy": _CONTENT_SECURITY_POLICY}
        )

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_MEDIA_TYPES:
            raise ApiError(404, "not found")
        return Response(
            _read_page_file(name), media_type=_PAGE_MEDIA_TYPES[name], headers={"Cache-Control": "no-cache"}
        )

    return app


async def with_timeout(timeout_s: float, awaitable: Awaitable[Any]) -> Any:
    """The result, if it is there in time.

    Raises:
        Refused: 503.
    """
    try:
        return await asyncio.wait_for(awaitable, timeout_s)
    except TimeoutError:
        raise deadline_exceeded(timeout_s) from None


async def _load_until_ready(model: ServedModel) -> None:
    """Loads a model, and again until it works: a replica that fails is started again by Ray Serve."""
    while not model.metadata:
        try:
            with suppress(ApiError):
                await model.load()
        except Exception as error:
            _log.error("the model %s cannot be loaded; trying again", model.name, exc_info=error)
            await asyncio.sleep(_LOAD_RETRY_DELAY_S)
        await asyncio.sleep(0.2)


def _video_media_type(request: Request, default: str) -> str:
    return negotiate_media_type(request.headers.get("accept", ""), default)


def _bits_per_pixel_header(bits_per_pixel: float) -> dict[str, str]:
    return {"X-Bits-Per-Pixel": f"{bits_per_pixel:.6g}"}


def _file_response(file: MediaFile, headers: dict[str, str]) -> Response:
    """A file, and what is known of it as headers."""
    optional_headers = {"X-Frames": file.num_frames, "X-PSNR": None if file.psnr is None else f"{file.psnr:.3f}"}
    headers |= {name: str(value) for name, value in optional_headers.items() if value is not None}
    return Response(file.data, media_type=file.media_type, headers=headers)


def _parse_body(body_type: type[Any], data: bytes) -> Any:
    try:
        return body_type.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        if first["type"] == "json_invalid":
            raise ApiError(415, "the body is not JSON") from None
        raise ApiError(
            422, f"{location + ': ' if location else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _read_page_file(name: str) -> bytes:
    return (resources.files("bsq_ray.serving") / "page" / name).read_bytes()
