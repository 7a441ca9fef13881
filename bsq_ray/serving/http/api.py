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

from bsq_ray.config.tokenizer_config import Strict
from bsq_ray.serving.errors import Refused, too_slow
from bsq_ray.serving.generation import PICTURES, DrawBody, draw, lines, picture_type
from bsq_ray.serving.http.admission import Guard
from bsq_ray.serving.http.body_prefetch import Attached
from bsq_ray.serving.http.openapi import described, html
from bsq_ray.serving.media.video_io import MKV, MP4, wanted_type
from bsq_ray.serving.payloads import File, PackedTokens
from bsq_ray.serving.registry import Model, Models
from bsq_ray.serving.service_config import Limits

_log = logging.getLogger("bsq_ray.serving")
_PAGE = {"style.css": "text/css", "script.js": "text/javascript"}
# Frames per second of tokens that do not say so.
_RATE = "25"
# Scripts, styles and pictures come from this server or from the page itself, and from nowhere else.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'none'"
)
# Content types that are certainly not a file of the kind that is wanted.
_NO_FILE = ("multipart/", "text/", "application/json", "application/xml")
# Seconds before a model is loaded again that failed otherwise than by not being there yet.
_FAILED_PAUSE = 5.0


class TokensBody(Strict):
    """Tokens of one image, or of a clip at a rate of frames per second, as `encode` answers."""

    model: str | None = None
    grid: tuple[int, int, int]
    bits: int
    rate: str | None = Field(None, pattern=r"^[1-9]\d{0,9}(/[1-9]\d{0,9})?$")
    packed: str

    def tokens(self) -> PackedTokens:
        """What a replica takes.

        Raises:
            Refused: 422 they are not base64.
        """
        try:
            packed = base64.b64decode(self.packed, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(422, "packed: not base64") from None
        rate = self.rate or (_RATE if self.grid[0] > 1 else None)
        return PackedTokens(list(self.grid), packed, rate)


def create_app(
    models: Models, limits: Limits, token_digest: str | None, loopback: bool, metrics: Callable[[], Awaitable[str]]
) -> FastAPI:
    """The application.

    Args:
        models: they are loaded while the application already answers.
        token_digest, loopback: see `Guard`.
        metrics: the text of `/metrics`.
    """
    guard = Guard(limits, token_digest, loopback)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_load(model)) for model in models]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="bsq_ray", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Attached)

    @app.exception_handler(Refused)
    async def refused(_: Request, refusal: Refused) -> JSONResponse:
        headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.status in (408, 413):
            # What is still on its way will not be read.
            headers["Connection"] = "close"
        return JSONResponse({"error": refusal.message}, refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def of_starlette(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail).lower()}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return JSONResponse({"error": "the service failed; its log says why"}, 500)

    async def of_file(offer: str, name: str | None, data: bytes, *more: Any) -> tuple[Model, Any]:
        chosen = models.taker_of(data, offer, name)
        return chosen, await within(limits.seconds, chosen.serving(offer).call(offer, data, *more))

    @app.post("/v1/encode", **described("encode"))
    async def encode(request: Request, model: str | None = None) -> Response:
        async with admitted(request, "encode") as data:
            chosen, tokens = await of_file("encode", model, data)
        rate = {} if tokens.rate is None else {"rate": tokens.rate}
        packed = base64.b64encode(tokens.packed).decode()
        facts = {"model": chosen.name, "grid": tokens.grid, "bits": chosen.facts["bits"]}
        return JSONResponse({**facts, **rate, "packed": packed})

    @app.post("/v1/decode", **described("decode"))
    async def decode(request: Request) -> Response:
        async with admitted(request, "decode") as data:
            body = _parsed(TokensBody, data)
            chosen = models.choose("decode", body.model)
            replicas = chosen.serving("decode")
            if body.bits != chosen.facts["bits"]:
                raise Refused(422, f"bits: tokens of this model have {chosen.facts['bits']}")
            file = await within(limits.seconds, replicas.call("decode", body.tokens(), _video_type(request, MP4)))
        return _answer(file, {"X-Model": chosen.name})

    @app.post("/v1/reconstruct", **described("reconstruct"))
    async def reconstruct(request: Request, model: str | None = None) -> Response:
        async with admitted(request, "reconstruct") as data:
            chosen, file = await of_file("reconstruct", model, data, _video_type(request, MP4))
        return _answer(file, {"X-Model": chosen.name, **_rate(chosen.facts["bits_per_pixel"])})

    @app.post("/v1/compress", **described("compress"))
    async def compress(request: Request, model: str | None = None) -> Response:
        async with admitted(request, "compress") as data:
            chosen, file = await of_file("compress", model, data)
        name = "image" if file.frames is None else "clip"
        headers = {"X-Model": chosen.name, "Content-Disposition": f'attachment; filename="{name}.bsq"'}
        return _answer(file, {**headers, **_rate(8 * len(file.data) / file.pixels)})

    @app.post("/v1/decompress", **described("decompress"))
    async def decompress(request: Request, model: str | None = None) -> Response:
        async with admitted(request, "decompress") as data:
            chosen = models.reader_of(data, model)
            call = chosen.serving("decompress").call("decompress", data, _video_type(request, MKV))
            file = await within(limits.seconds, call)
        return _answer(file, {"X-Model": chosen.name, **_rate(8 * len(data) / file.pixels)})

    @app.post("/v1/measure", **described("measure"))
    async def measure(request: Request, model: str | None = None) -> Response:
        async with admitted(request, "measure") as data:
            chosen, figures = await of_file("measure", model, data)
        return JSONResponse({"model": chosen.name, **figures})

    @app.post("/v1/generate", **described("generate"))
    async def generate(request: Request) -> Response:
        async with received(request) as data:
            body = _parsed(DrawBody, data)
        pictures = draw(body, models, guard, limits.seconds)
        # The first one tells what is wrong with a request, while the answer has not begun.
        picture = await anext(pictures)
        chosen = models.choose("generate", body.model)
        if any(kind in request.headers.get("accept", "") for kind in PICTURES):
            async for later in pictures:
                picture = later
            return Response(picture, media_type=picture_type(chosen.kind), headers={"X-Seed": str(body.seed)})
        steps, kind = body.steps or chosen.facts["steps"], picture_type(chosen.kind)
        return StreamingResponse(lines(picture, pictures, body, steps, kind), media_type="application/x-ndjson")

    @asynccontextmanager
    async def received(request: Request) -> AsyncIterator[bytes]:
        guard.check_sender(request)
        async with guard.body(request) as data:
            yield data

    @asynccontextmanager
    async def admitted(request: Request, offer: str) -> AsyncIterator[bytes]:
        kind = request.headers.get("content-type", "").lower()
        if offer != "decode" and kind.startswith(_NO_FILE):
            raise Refused(415, f"send the file itself as the body (curl --data-binary @FILE), not {kind.split(';')[0]}")
        async with received(request) as data:
            if not data:
                raise Refused(422, "the body is empty")
            with guard.turn():
                yield data

    @app.get("/v1/models", **described("models"))
    async def list_models(request: Request) -> Response:
        guard.check_sender(request)
        return JSONResponse({"models": models.described()})

    @app.get("/healthz", **described("healthz"))
    async def healthz() -> Response:
        unloaded = models.unloaded
        if unloaded:
            return JSONResponse({"status": "loading", "models": unloaded}, 503, {"Retry-After": "2"})
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", **described("metrics"))
    async def of_ray(request: Request) -> Response:
        guard.check_sender(request)
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(html(app.openapi()), headers={"Content-Security-Policy": _POLICY})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_page("index.html"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE:
            raise Refused(404, "not found")
        return Response(_page(name), media_type=_PAGE[name], headers={"Cache-Control": "no-cache"})

    return app


async def within(seconds: float, work: Awaitable[Any]) -> Any:
    """The result, if it is there in time.

    Raises:
        Refused: 503.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise too_slow(seconds) from None


async def _load(model: Model) -> None:
    """Loads a model, and again until it works: a replica that fails is started again by Ray Serve."""
    while not model.facts:
        try:
            with suppress(Refused):
                await model.load()
        except Exception as error:
            _log.error("the model %s cannot be loaded; trying again", model.name, exc_info=error)
            await asyncio.sleep(_FAILED_PAUSE)
        await asyncio.sleep(0.2)


def _video_type(request: Request, default: str) -> str:
    return wanted_type(request.headers.get("accept", ""), default)


def _rate(bits_per_pixel: float) -> dict[str, str]:
    return {"X-Bits-Per-Pixel": f"{bits_per_pixel:.6g}"}


def _answer(file: File, headers: dict[str, str]) -> Response:
    """A file, and what is known of it as headers."""
    known = {"X-Frames": file.frames, "X-PSNR": None if file.psnr is None else f"{file.psnr:.3f}"}
    headers |= {name: str(value) for name, value in known.items() if value is not None}
    return Response(file.data, media_type=file.media_type, headers=headers)


def _parsed(form: type[Any], data: bytes) -> Any:
    try:
        return form.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "json_invalid":
            raise Refused(415, "the body is not JSON") from None
        raise Refused(422, f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None


def _page(name: str) -> bytes:
    return (resources.files("bsq_ray.serving") / "page" / name).read_bytes()
