"""The endpoints that run models: `POST /v1/…`.

    body ─authenticate, admit─▶ choose a model ─▶ its replicas ─within the timeout─▶ file or JSON

The docstrings of the endpoints are their descriptions in the OpenAPI schema.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError

from bsq_ray.serving.errors import ApiError, deadline_exceeded_error
from bsq_ray.serving.generation import GENERATED_MEDIA_TYPES, generate_images, generated_media_type, ndjson_lines
from bsq_ray.serving.http.admission import AdmissionControl
from bsq_ray.serving.http.openapi import error_responses, file_content, json_content, request_body, success
from bsq_ray.serving.http.schemas import GenerateBody, GenerateStep, MeasureResponse, TokensBody
from bsq_ray.serving.media.video_io import MKV, MP4, negotiate_media_type
from bsq_ray.serving.payloads import BSQ_MEDIA_TYPE, MediaFile
from bsq_ray.serving.registry import ModelRegistry, ServedModel
from bsq_ray.serving.service_config import Limits

# Content types that cannot be a file of an expected kind.
_REJECTED_CONTENT_TYPES = ("multipart/", "text/", "application/json", "application/xml")
ModelParameter = Annotated[
    str | None, Query(description="name or ID of the model; default: the first one with this capability")
]
BitsParameter = Annotated[
    int | None,
    Query(ge=1, description="bits per token of a model with nested bits, one of its `selectable_bits`; default: all"),
]
PlanesParameter = Annotated[
    int | None, Query(ge=1, description="number of leading planes of nested bits to decode; default: all")
]
Body = TypeVar("Body", bound=BaseModel)


class InferenceEndpoints:
    """The endpoints of the models of a registry."""

    def __init__(self, models: ModelRegistry, admission: AdmissionControl, limits: Limits) -> None:
        self._models, self._admission, self._timeout_s = models, admission, limits.request_timeout_s

    def router(self) -> APIRouter:
        """Return the routes and their descriptions."""
        router = APIRouter(prefix="/v1", responses=error_responses())
        add = partial(router.add_api_route, methods=["POST"])
        media, decoded = file_content("image/*", "video/*"), file_content("image/png", MP4, MKV)
        add(
            "/encode", self.encode, summary="Image or video to tokens", openapi_extra=request_body(media),
            response_model=TokensBody, response_class=JSONResponse,
        )  # fmt: skip
        add(
            "/decode", self.decode, summary="Tokens to image or video", response_class=Response,
            openapi_extra=request_body(json_content(TokensBody)), responses=success(decoded),
        )  # fmt: skip
        add(
            "/reconstruct", self.reconstruct, summary="Image or video to its reconstruction", response_class=Response,
            openapi_extra=request_body(media), responses=success(decoded),
        )  # fmt: skip
        add(
            "/compress", self.compress, summary="Image or video to .bsq file", response_class=Response,
            openapi_extra=request_body(media), responses=success(file_content(BSQ_MEDIA_TYPE)),
        )  # fmt: skip
        add(
            "/decompress", self.decompress, summary=".bsq file to image or video", response_class=Response,
            openapi_extra=request_body(file_content(BSQ_MEDIA_TYPE)), responses=success(decoded),
        )  # fmt: skip
        add(
            "/measure", self.measure, summary="Rate and quality of an image", response_class=JSONResponse,
            openapi_extra=request_body(file_content("image/*")), response_model=MeasureResponse,
        )  # fmt: skip
        generated = json_content(GenerateStep, "application/x-ndjson") | file_content(*GENERATED_MEDIA_TYPES)
        add(
            "/generate", self.generate, summary="Class to image or video", response_class=Response,
            openapi_extra=request_body(json_content(GenerateBody)), responses=success(generated),
        )  # fmt: skip
        return router

    async def encode(self, request: Request, model: ModelParameter = None) -> Response:
        """Images and frames are resized and cropped to the model's square.

        A model with `any_size` encodes a file at its own size; edges are replicated to whole patches.
        An image model encodes a video frame by frame.
        """
        async with self._admitted_file(request) as data:
            target, tokens = await self._run_on_upload("encode", model, data)
        rate_field = {} if tokens.rate is None else {"rate": tokens.rate}
        packed = base64.b64encode(tokens.packed).decode()
        fields = {"model": target.name, "grid": tokens.grid, "bits": target.metadata["bits"]}
        return JSONResponse({**fields, **rate_field, "packed": packed})

    async def decode(self, request: Request) -> Response:
        """The body is a response of encode.

        A model with `any_size` decodes tokens of any grid.
        A video is MP4 (H.264), or with `Accept: video/x-matroska` MKV (FFV1, lossless).
        """
        async with self._admitted_body(request) as data:
            body = _parse_body(TokensBody, data)
            target = self._models.choose("decode", body.model)
            replicas = target.replicas_for("decode")
            if body.bits != target.metadata["bits"]:
                raise ApiError(422, f"bits: this model has {target.metadata['bits']} bits per token")
            call = replicas.call("decode", body.to_packed_tokens(), _video_media_type(request, MP4))
            file = await with_timeout(self._timeout_s, call)
        return _file_response(file, {"X-Model": target.name})

    async def reconstruct(self, request: Request, model: ModelParameter = None) -> Response:
        """Encode and decode in one request, at the size of the model's square.

        A model with `any_size` reconstructs a file at its own size.
        Videos as in decode. Headers: X-Bits-Per-Pixel, X-PSNR (mean over frames), X-Frames of a video.
        """
        media_type = _video_media_type(request, MP4)
        async with self._admitted_file(request) as data:
            target, file = await self._run_on_upload("reconstruct", model, data, media_type)
        bits_per_pixel = target.metadata["bits_per_pixel"]
        if file.num_bits is not None:
            bits_per_pixel = file.num_bits / file.num_pixels
        return _file_response(file, {"X-Model": target.name, **_bits_per_pixel_header(bits_per_pixel)})

    async def compress(self, request: Request, model: ModelParameter = None, bits: BitsParameter = None) -> Response:
        """The file can have any size; sound is not kept.

        Video formats: MP4, MOV, 3GP, MKV, WebM, AVI, Ogg and WMV. Without a model name the first video model
        compresses videos. Headers: X-Bits-Per-Pixel, X-Frames of a video.
        """
        async with self._admitted_file(request) as data:
            target, file = await self._run_on_upload("compress", model, data, bits)
        name = "image" if file.num_frames is None else "clip"
        headers = {"X-Model": target.name, "Content-Disposition": f'attachment; filename="{name}.bsq"'}
        return _file_response(file, {**headers, **_bits_per_pixel_header(8 * len(file.data) / file.num_pixels)})

    async def decompress(
        self, request: Request, model: ModelParameter = None, planes: PlanesParameter = None
    ) -> Response:
        """The file names the model that decompresses it.

        A video is MKV (FFV1, lossless), or with `Accept: video/mp4` MP4 (H.264), which browsers can play.
        A file of nested bits that is cut decodes to its last whole plane. Headers: X-Bits-Per-Token, the bits per
        token that were decoded and those of the file before it was cut, such as 12/24; X-Bytes, the bytes that were
        decoded and those of all whole planes in the body; X-Bits-Per-Pixel of the decoded bytes; X-Frames of a video.
        """
        async with self._admitted_file(request) as data:
            target = self._models.model_for_bsq(data, model)
            call = target.replicas_for("decompress").call("decompress", data, _video_media_type(request, MKV), planes)
            file: MediaFile = await with_timeout(self._timeout_s, call)
        part = file.decoded_part
        assert part is not None
        headers = {
            "X-Model": target.name,
            "X-Bits-Per-Token": f"{part.num_bits}/{part.stored_bits}",
            "X-Bytes": f"{part.num_bytes}/{part.available_bytes}",
        }
        return _file_response(file, {**headers, **_bits_per_pixel_header(8 * part.num_bytes / file.num_pixels)})

    async def measure(self, request: Request, model: ModelParameter = None, bits: BitsParameter = None) -> Response:
        """Bits per pixel, PSNR, LPIPS, and the sizes of JPEG and WebP files of equal PSNR and of equal LPIPS."""
        async with self._admitted_file(request) as data:
            target, report = await self._run_on_upload("measure", model, data, bits)
        return JSONResponse({"model": target.name, **report})

    async def generate(self, request: Request) -> Response:
        """One line of JSON after each step, with the image as a data URL.

        With `Accept: image/png` only the final image. Video models return animated WebP.
        """
        self._admission.authenticate(request)
        async with self._admission.read_body(request) as data:
            body = _parse_body(GenerateBody, data)
        images = generate_images(body, self._models, admission=self._admission, timeout_s=self._timeout_s)
        # An invalid request fails at the first image, while the status can still be set.
        image = await anext(images)
        target = self._models.choose("generate", body.model)
        media_type = generated_media_type(target.kind)
        if any(accepted in request.headers.get("accept", "") for accepted in GENERATED_MEDIA_TYPES):
            async for next_image in images:
                image = next_image
            return Response(image, media_type=media_type, headers={"X-Seed": str(body.seed)})
        num_steps = body.steps or target.metadata["steps"]
        lines = ndjson_lines(image, images, seed=body.seed, num_steps=num_steps, media_type=media_type)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @asynccontextmanager
    async def _admitted_file(self, request: Request) -> AsyncIterator[bytes]:
        """Yield a body that is a file, in a request slot."""
        content_type = request.headers.get("content-type", "").lower()
        if content_type.startswith(_REJECTED_CONTENT_TYPES):
            raise ApiError(
                415,
                f"unexpected content type {content_type.split(';')[0]}; send the file itself as the body "
                "(curl --data-binary @FILE)",
            )
        async with self._admitted_body(request) as data:
            yield data

    @asynccontextmanager
    async def _admitted_body(self, request: Request) -> AsyncIterator[bytes]:
        """Yield a body of any kind, in a request slot."""
        self._admission.authenticate(request)
        async with self._admission.read_body(request) as data:
            if not data:
                raise ApiError(422, "the body is empty")
            with self._admission.slot():
                yield data

    async def _run_on_upload(
        self, capability: str, name: str | None, data: bytes, *arguments: Any
    ) -> tuple[ServedModel, Any]:
        target = self._models.model_for_upload(data, capability, name)
        call = target.replicas_for(capability).call(capability, data, *arguments)
        return target, await with_timeout(self._timeout_s, call)


async def with_timeout(timeout_s: float, awaitable: Awaitable[Any]) -> Any:
    """Return the result of an awaitable.

    Raises:
        ApiError: 503 the timeout passed.
    """
    try:
        return await asyncio.wait_for(awaitable, timeout_s)
    except TimeoutError:
        raise deadline_exceeded_error(timeout_s) from None


def _video_media_type(request: Request, default: str) -> str:
    return negotiate_media_type(request.headers.get("accept", ""), default)


def _bits_per_pixel_header(bits_per_pixel: float) -> dict[str, str]:
    return {"X-Bits-Per-Pixel": f"{bits_per_pixel:.6g}"}


def _file_response(file: MediaFile, headers: dict[str, str]) -> Response:
    """Return a file, with its metadata as headers."""
    optional_headers = {"X-Frames": file.num_frames, "X-PSNR": None if file.psnr is None else f"{file.psnr:.3f}"}
    headers |= {name: str(value) for name, value in optional_headers.items() if value is not None}
    return Response(file.data, media_type=file.media_type, headers=headers)


def _parse_body(body_type: type[Body], data: bytes) -> Body:
    try:
        return body_type.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise ApiError(415, "the body is not JSON") from None
        location = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(422, f"{location}: {message}" if location else message) from None
